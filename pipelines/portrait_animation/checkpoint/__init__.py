"""The official checkpoint: names of its weights, its conversion, and the converted folder opened."""
