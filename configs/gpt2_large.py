# GPT-2 large, 774M parameters.
n_layer, n_head, n_embd, block_size = 36, 20, 1280, 1024
batch_size = 4
