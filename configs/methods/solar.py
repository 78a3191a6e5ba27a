# SOLAR's depth up-scaling (Kim et al. 2024, arXiv:2312.15166): two overlapping copies, for example
# 32 to 48 blocks. The authors start from a pretrained model (--init_weights).
stages, stage_blocks, stage_alpha = 1, ("67%", "100%"), 0.0
phase_fractions, freezing = (0.5, 0.5), "none"
growth, optimizer_state = "solar", "reset"
