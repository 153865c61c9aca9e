"""The command: a checkpoint opened, memory foreseen, a clip upscaled and resumed."""
