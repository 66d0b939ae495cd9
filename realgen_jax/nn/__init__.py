"""Layers, attention, autoencoder, LoRA and checkpoint conversion: what model families share."""
