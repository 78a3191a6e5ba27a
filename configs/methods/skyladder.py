# SkyLadder (Zhu et al. 2025, arXiv:2503.15450): the context grows over 60% of the steps, from 32 of
# 1,024 tokens, with the same number of tokens per step. The authors' code (sail-sg/SkyLadder) adds
# a token at a time; here, the length doubles, at the steps at which theirs reaches it.
context_ramp = "0:3.125% 1.9%:6.25% 5.8%:12.5% 13.5%:25% 29%:50% 60%:100%"
