"""Rewards for generated pictures: PyTorch detectors behind one bridge. Imports nothing of realgen_jax."""
