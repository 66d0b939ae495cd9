"""Checks that explain why a run's reward does not rise, from the metrics the run has written."""
