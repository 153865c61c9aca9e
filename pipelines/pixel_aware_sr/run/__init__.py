"""The command: one picture after the other."""
