"""How the bundled tiny pipelines are made; `scripts/train_tiny.py` is the command."""
