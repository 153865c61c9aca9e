"""The command: one image after the other."""
