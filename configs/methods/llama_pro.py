# LLaMA-Pro (Wu et al. 2024, arXiv:2401.02415): after the last block of each group, a copy with zero
# output projections, so that the model's function is preserved. Then only the new blocks train. The
# authors grow a pretrained model from 32 to 40 blocks: use --init_weights and --phase_fractions
# 0 0 1 0. As it is, the first half of the steps trains the smaller model.
stages, stage_blocks, stage_alpha = 1, ("80%", "100%"), 0.0
phase_fractions = (0, 0.5, 0.5, 0)
growth, freezing = "zero_output", "all_but_new"
