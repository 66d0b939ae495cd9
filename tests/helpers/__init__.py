"""What tests share: golden arrays, whole programs, stand-in servers and tiny checkpoints."""
