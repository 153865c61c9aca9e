"""What `scripts/routing_fidelity.py` is made of."""
