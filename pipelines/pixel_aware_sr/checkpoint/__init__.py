"""The official checkpoint's networks, and the base model under them."""
