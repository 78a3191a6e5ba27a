# The paper's schedule with S = 12 stages, followed by 10,000 steps of continual training.
stages, continual_steps = 12, 10_000
