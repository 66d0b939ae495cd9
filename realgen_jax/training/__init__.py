"""A training run: set-up, epoch, scoring, learning, evaluation, saving."""
