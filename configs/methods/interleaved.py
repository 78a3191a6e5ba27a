# Interleaved copy, 0 0 1 1 2 2 (interposition, arXiv:2510.08008, which applies it to converged
# mixture-of-experts models; also an option of tongxuluo/prts for bert2BERT). The time of growth is
# our choice.
stages, stage_blocks, stage_alpha = 1, ("50%", "100%"), 0.0
phase_fractions, freezing = (0.3, 0.7), "none"
growth, optimizer_state = "interleave", "copy"
