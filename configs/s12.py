# The paper's schedule of S = 12 stages, then as many steps of continual training.
stages, continual_steps = 12, 10_000
