# One-layer growth (Bu 2025, arXiv:2511.04981): one block, then copies of it in one step, at 80% of
# the steps, before the learning rate decays over the last 10%. The authors use Muon. What happens
# to the optimizer state is not known to us.
stages, stage_blocks, stage_alpha = 1, (1, "100%"), 0.0
phase_fractions, freezing = (0.8, 0.2), "none"
growth = "stack"
lr_schedule, decay_fraction, min_lr = "wsd", 0.1, 0.0
