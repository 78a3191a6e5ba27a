# The experiment at a size that two CPU cores train in minutes: eight narrow blocks, bytes of
# Python's standard library. The learning rate is higher than the paper's, as suits the width, and
# starts with a short warm-up; it stays constant as in the paper.
n_layer, n_head, n_embd, block_size = 8, 4, 64, 128
data_dir = "data/stdlib"
steps, tokens_per_step, batch_size = 700, 2048, 16
learning_rate, lr_schedule, warmup_steps, grad_clip = 3e-3, "constant", 20, 1.0
log_interval, eval_interval, checkpoint_interval = 10, 100, 200
eval_tokens, hellaswag_limit = 32_768, 300
device, compile = "cpu", "none"
