# The size of GPT-3 6.7B (Brown et al. 2020, arXiv:2005.14165, table 2.1). Needs several GPUs.
n_layer, n_head, n_embd, block_size = 32, 32, 4096, 2048
batch_size = 1
sharding = "fsdp"
