# Half of the blocks train for 30 % of the steps; then the stack is copied on top of itself, once,
# and everything trains (progressive stacking, Gong et al. 2019, with one step; G_stack, Du et al.
# 2024, arXiv:2405.15319, with factor 2). The copies also get the optimizer state of their sources;
# --optimizer_state=carry starts them from zero.
stages, phase_fractions, freezing = 2, (0.3, 0.7), False
growth, optimizer_state = "stack", "copy"
