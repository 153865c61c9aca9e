"""What the trainer is fed."""
