# The paper's schedule of S = 8 stages, then as many steps of continual training.
stages, continual_steps = 8, 10_000
