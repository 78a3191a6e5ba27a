# The paper's experiment at a size that two CPU cores can train in minutes: eight narrow blocks,
# trained on the bytes of Python's standard library. The learning rate is constant, as in the paper.
# It is higher than the paper's because the model is narrow, and has a short warm-up.
n_layer, n_head, n_embd, block_size = 8, 4, 64, 128
data_dir = "data/stdlib"
steps, tokens_per_step, batch_size = 700, 2048, 16
learning_rate, lr_schedule, warmup_steps, grad_clip = 3e-3, "constant", 20, 1.0
log_interval, eval_interval, checkpoint_interval = 10, 100, 200
eval_tokens, hellaswag_limit = 32_768, 300
device, compile = "cpu", "none"
