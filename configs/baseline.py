# The baseline: one phase, all blocks train from the start.
stages, continual_steps = 1, 0
