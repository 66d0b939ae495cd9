"""Rewards for generated pictures: PyTorch detectors behind a bridge. Never imports realgen_jax."""
