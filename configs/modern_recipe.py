# What one would train with today: warm-up, a stable rate, linear decay to zero, clipping, and a short warm-up where a phase
# begins. The decay ends with the run, so compare runs of equal length in cost: --continual_steps=equal_flops.
learning_rate, lr_schedule, warmup_iters, rewarm_iters = 6e-4, "wsd", 500, 100
decay_share, min_lr, grad_clip = 0.2, 0.0, 1.0
weight_decay, beta1, beta2 = 0.1, 0.9, 0.95
tokens_per_step = 512 * 1024
steps = 10_000
phase_optimizer, continual_optimizer = "carry", "carry"
eval_interval = 250
