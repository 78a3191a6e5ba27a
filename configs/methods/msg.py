# MSG (Yao et al. 2023, arXiv:2305.02869), for depth: the residual branches of new blocks are scaled
# by a factor that rises from 0 to 1. From the authors' code (cofe-ai/MSG): new blocks are copies on
# top, and the factor rises over 5,000 steps by default. Differences: the authors scale the output
# of a whole block, start at exactly 0 (here, 1/501), and rewind the learning rate at growth.
stages, stage_blocks, stage_alpha = 1, ("50%", "100%"), 0.0
phase_fractions, freezing = (0.3, 0.7), "none"
growth, fade_in_steps = "stack", 500
