# RAPTR (Panigrahi et al. 2024, arXiv:2402.05913): random subnetworks with an average of 6, 8, 10
# and 12 of 12 blocks in 4 equal stages. The first and the last block always run. No code was
# released; the factor by which the paper scales the outputs of blocks is not known to us.
stages, stage_blocks, stage_alpha = 1, ("100%", "100%", "100%", "100%"), 0.0
phase_fractions, freezing = None, "none"
skip_policy, skip_rate = "subnetwork", (1 / 2, 1 / 3, 1 / 6, 0.0)
