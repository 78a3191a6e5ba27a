# FreezeOut (Brock et al. 2017, arXiv:1706.04983), cubic and scaled, with the t_0 of the authors:
# the first block is frozen after 51% of the steps, and the position embeddings with it. The token
# embeddings are tied to the head, which trains to the end. FreezeOut's annealing is multiplied by
# lr_schedule, which should therefore be constant.
lr_schedule = "constant"
freezeout = 0.8
