# Progressive stacking (Gong et al. 2019, "Efficient Training of BERT by Progressively Stacking"): a
# quarter of the blocks, then half, then all. Each time, the whole stack is copied on top of itself.
# From the authors' code (gonglinyuan/StackingBERT): 50K, 70K and 400K steps; a new optimizer in
# each stage; one continuous linear decay of the learning rate, without a second warm-up.
rewarmup_steps, lr_schedule, decay_fraction = 0, "wsd", 1.0
stages, stage_blocks, stage_alpha = 1, ("25%", "50%", "100%"), 0.0
phase_fractions, freezing = (50, 70, 400), "none"
growth, optimizer_state = "stack", "reset"
