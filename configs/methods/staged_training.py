# Staged training (Shen et al. 2022, arXiv:2203.06211), for depth: interleaved copies with copied
# moments, doubled twice. When the model grows, the learning-rate schedule is set back by 1 - 1/1.46
# of its position and warms up for 150 steps. From the authors' code (allenai/staged-training),
# whose option for loss preservation has no effect on the weights. The authors choose the time of
# growth based on the slope of the loss; here it is fixed.
stages, stage_blocks, stage_alpha = 1, ("25%", "50%", "100%"), 0.0
phase_fractions, freezing = (0.1, 0.2, 0.7), "none"
growth, optimizer_state = "interleave", "copy"
lr_setback, rewarmup_steps, lr_schedule = 0.315, 150, "cosine"
