# The baseline: a single phase that trains all blocks.
stages, continual_steps = 1, 0
