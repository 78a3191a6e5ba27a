# New blocks interpolate linearly between their neighbors, as in multilevel training of transformers
# viewed as ordinary differential equations (code: Salva4/multilevel_transformer). There, residual
# branches are also scaled by 1/depth, as with --base_depth. The time of growth is our choice.
stages, stage_blocks, stage_alpha = 1, ("50%", "100%"), 0.0
phase_fractions, freezing = (0.3, 0.7), "none"
growth, optimizer_state = "interpolate", "copy"
