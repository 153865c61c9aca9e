"""PASD under SDXL."""
