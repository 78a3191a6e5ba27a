# Blocks are skipped at random, deep blocks and early steps more often: block l of L with
# probability 0.2 * l/(L-1) * (1 - t/(T-1)) in step t of T (arXiv:2609.05275).
skip_policy, skip_rate = "layer_dropout", 0.2
