# Interleaved copy, 0 0 1 1 2 2 (interposition, arXiv:2510.08008, which applies it to converged
# mixture-of-experts models; also the depth growth of bert2BERT). The time of growth is our choice.
stage_blocks, phase_fractions, freezing = ("50%", "100%"), (0.3, 0.7), "none"
growth, optimizer_state = "interleave", "copy"
