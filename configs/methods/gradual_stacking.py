# Gradual stacking (Reddi et al. 2023, "Efficient Training of Language Models using Few-Shot
# Learning"): each of 4 equal stages appends a copy of the last group of blocks. What the authors do
# with the optimizer state is not known to us.
stages, stage_blocks, stage_alpha = 4, None, 0.0
phase_fractions, freezing = None, "none"
growth, optimizer_state = "copy_last", "copy"
