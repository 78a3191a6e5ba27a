# The tokens per step grow from a quarter to the full number in 3 parts of equal length, similar to
# modded-nanogpt (KellerJordan/modded-nanogpt, train_gpt.py), which also changes the learning rate.
tokens_per_step_ramp = "0:25% 33.3%:50% 66.7%:100%"
