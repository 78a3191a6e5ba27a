# GPT-2 124M, the paper's model.
n_layer, n_head, n_embd, block_size = 12, 12, 768, 1024
batch_size = 16
