# The paper's training recipe: constant learning rate, no warm-up, no gradient clipping, and a new
# AdamW for the continual phase.
learning_rate, lr_schedule, warmup_steps, grad_clip = 6e-4, "constant", 0, 0.0
weight_decay, beta1, beta2 = 0.1, 0.9, 0.95
tokens_per_step = 512 * 1024
steps = 10_000
optimizer_state, continual_optimizer_state = "carry", "reset"
eval_interval = 250
