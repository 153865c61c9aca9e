"""What is asked of a swap: where and when, parts of a run, levels by name, recipes."""
