# Context length 512 for the first half of the steps and 1024 for the second half, with the same
# number of tokens per step (GrowLength, Jin et al. 2023, arXiv:2310.00576, with two lengths).
context_ramp = "0:512 50%:1024"
