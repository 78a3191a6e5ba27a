# GrowLength (Jin et al. 2023, arXiv:2310.00576): the context grows from an eighth to its full
# length, with the same number of tokens per step. The stages of the authors are not known to us.
context_ramp = "0:12.5% 25%:25% 50%:50% 75%:100%"
