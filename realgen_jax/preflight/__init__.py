"""What scripts/preflight.py is made of."""
