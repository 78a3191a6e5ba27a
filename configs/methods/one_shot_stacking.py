# Trains half of the blocks for 30% of the steps, then copies them on top of themselves and trains
# everything. This is progressive stacking (Gong et al. 2019) in one step. The copies also get the
# optimizer state of their sources; with --optimizer_state=carry, they start without state. G_stack
# (Du et al. 2024, arXiv:2405.15319) stacks by a factor of 4, resets the optimizer and restarts the
# learning-rate schedule.
stages, phase_fractions, freezing = 2, (0.3, 0.7), "none"
growth, optimizer_state = "stack", "copy"
