# Skips blocks at random, more often for deep blocks and in early steps: block l of L is skipped in
# step t of T with probability 0.2 * l/(L-1) * (1 - t/(T-1)) (arXiv:2609.05275).
skip_policy, skip_rate = "layer_dropout", 0.2
