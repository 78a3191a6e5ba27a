# The paper's schedule with S = 4 stages, followed by 10,000 steps of continual training.
stages, continual_steps = 4, 10_000
