"""Stable Diffusion 3 and 3.5: transformer, names in checkpoints, schedule."""
