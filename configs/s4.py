# The paper's schedule of S = 4 stages, then as many steps of continual training.
stages, continual_steps = 4, 10_000
