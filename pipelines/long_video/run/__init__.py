"""The command: the processes of torchrun, and the run from settings to file."""
