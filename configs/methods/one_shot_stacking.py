# Half of the blocks train for 30 % of the steps. Then the stack is copied on top of itself, once,
# and everything trains: progressive stacking (Gong et al. 2019) in one step. The copies also get
# the optimizer state of their sources; --optimizer_state=carry starts them from zero. G_stack (Du
# et al. 2024, arXiv:2405.15319) stacks by factor 4 and restarts optimizer and learning rate.
stages, phase_fractions, freezing = 2, (0.3, 0.7), False
growth, optimizer_state = "stack", "copy"
