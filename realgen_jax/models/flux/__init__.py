"""FLUX.1: transformer, checkpoint conversion, LoRA targets and costs."""
