"""What `scripts/patterns.py` is made of."""
