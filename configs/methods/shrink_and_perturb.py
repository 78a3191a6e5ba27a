# Warm-starting by shrinking and perturbing (arXiv:2411.07340 and 2605.13405), for depth: weights
# become 0.4 times the weight plus a new initial weight, and the added blocks are random. The
# authors' operator is not public; the factor and the reset of the optimizer are our choice. They
# mainly grow the width, by a factor of 2.
stages, stage_blocks, stage_alpha = 1, ("50%", "100%"), 0.0
phase_fractions, freezing = (0.3, 0.7), "none"
growth, shrink, perturb, optimizer_state = "random", 0.4, 1.0, "reset"
