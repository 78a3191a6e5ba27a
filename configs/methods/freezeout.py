# FreezeOut (Brock et al. 2017, arXiv:1706.04983), cubic and scaled, with the t_0 of the authors:
# the first block is frozen after 51% of the steps, and the embeddings together with it.
freezeout = 0.8
