"""Estimate memory, operations and time of a run before it starts."""
