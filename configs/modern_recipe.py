# A modern recipe: warm-up, constant learning rate, linear decay to zero, gradient clipping, and a
# short warm-up at the start of every later phase. The learning rate decays until the end of the
# run, so compare only runs that end compute-matched (--continual_steps=match_flops).
learning_rate, lr_schedule, warmup_steps, rewarmup_steps = 6e-4, "wsd", 500, 100
decay_fraction, min_lr, grad_clip = 0.2, 0.0, 1.0
weight_decay, beta1, beta2 = 0.1, 0.9, 0.95
tokens_per_step = 512 * 1024
steps = 10_000
optimizer_state, continual_optimizer_state = "carry", "carry"
eval_interval = 250
