"""What surrounds every command: what reaches the terminal, options from files, and records of what was made."""
