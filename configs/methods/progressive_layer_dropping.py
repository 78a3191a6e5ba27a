# Progressive layer dropping (Zhang & He 2020, arXiv:2010.13369): blocks are skipped more often the
# deeper they are, up to 50%, and soon after the start. DeepSpeed's default decay is 0.001 per
# step; here it is 100 per run. DeepSpeed's BERT scales a block by the keep probability of the next
# one; here, it is that of the block itself.
skip_policy, skip_rate = "progressive_layer_dropping", 0.5
