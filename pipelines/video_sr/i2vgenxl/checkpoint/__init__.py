"""The official checkpoint: names of its weights, and its conversion."""
