"""What is optimised: losses and their records of a rollout."""
