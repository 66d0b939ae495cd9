"""Qwen3, the language model: transformer, checkpoint conversion, LoRA targets."""
