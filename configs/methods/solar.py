# SOLAR's depth up-scaling (Kim et al. 2024, arXiv:2312.15166): two overlapping copies, for example
# 32 to 48 blocks. The authors grow a pretrained model: use --init_weights and --phase_fractions
# 0 1. As it is, the first half of the steps trains the smaller model.
stages, stage_blocks, stage_alpha = 1, ("67%", "100%"), 0.0
phase_fractions, freezing = (0.5, 0.5), "none"
growth, optimizer_state = "solar", "reset"
