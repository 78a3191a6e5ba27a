# GPT-2 medium, 355M parameters.
n_layer, n_head, n_embd, block_size = 24, 16, 1024, 1024
batch_size = 8
