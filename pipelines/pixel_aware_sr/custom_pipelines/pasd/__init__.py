"""PASD under Stable Diffusion 1.5."""
