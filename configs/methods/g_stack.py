# G_stack (Du et al. 2024, arXiv:2405.15319): one copy of the whole stack by a factor of 4, early.
# From the authors' code (tongxuluo/prts): the small model is taken after 5,000 of 300,000 steps,
# long before its learning rate decays. The large one gets a new optimizer and a new cosine with
# warm-up, and nothing is frozen. The authors train the small model at a higher peak rate (1e-3
# instead of 3e-4); here, both have the same. A warm-up should be shorter than the first stage.
stages, stage_blocks, stage_alpha = 1, ("25%", "100%"), 0.0
phase_fractions, freezing = (5_000, 300_000), "none"
growth, optimizer_state, lr_setback = "stack", "reset", 1.0
lr_schedule, rewarmup_steps = "cosine", 0
