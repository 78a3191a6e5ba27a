# GPT-2 XL, 1558M parameters.
n_layer, n_head, n_embd, block_size = 48, 25, 1600, 1024
batch_size = 2
