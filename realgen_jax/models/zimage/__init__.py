"""Z-Image: transformer, checkpoint conversion and LoRA targets."""
