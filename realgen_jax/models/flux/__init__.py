"""FLUX.1: transformer, autoencoder, LoRA, checkpoint conversion and the cache of text embeddings."""
