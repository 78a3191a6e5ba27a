# MIDAS (Saunshi et al. 2024, arXiv:2409.19044): each stage duplicates the middle group of blocks.
# The lengths of the stages are proportional to s^alpha (PROP-alpha). No code was released. The
# re-implementation cordschmidt/stacking-knowledge copies the moments, but its published runs reset
# them and have alpha = 0. Which alpha the authors prefer is not known to us.
stages, stage_blocks, stage_alpha = 4, None, 1.0
phase_fractions, freezing = None, "none"
growth, optimizer_state = "copy_middle", "copy"
