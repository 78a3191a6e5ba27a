# The paper's schedule with S = 8 stages, followed by 10,000 steps of continual training.
stages, continual_steps = 8, 10_000
