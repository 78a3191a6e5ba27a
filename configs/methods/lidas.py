# LIDAS (arXiv:2512.08819): like MIDAS, but the inserted group consists of the upper half of the
# group below it and the lower half of the group above. No code was released; the map is the one
# that the paper's reviews describe. What happens to the optimizer state is not known to us.
stages, stage_blocks, stage_alpha = 4, None, 1.0
phase_fractions, freezing = None, "none"
growth, optimizer_state = "lidas", "copy"
