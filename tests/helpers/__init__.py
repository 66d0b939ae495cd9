"""What tests share: golden arrays, programs run as a user runs them, stand-in servers and tiny checkpoints."""
