# Progressive layer dropping (Zhang & He 2020, arXiv:2010.13369): the deeper a block is, the more
# often it is skipped, up to 50%, starting soon after the beginning. DeepSpeed's default decay is
# 0.001 per step; here it is 100 per run. DeepSpeed's BERT scales a block by the keep probability of
# the next one; here, it is that of the block itself.
skip_policy, skip_rate = "progressive_layer_dropping", 0.5
