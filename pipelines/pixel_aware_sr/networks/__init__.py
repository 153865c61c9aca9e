"""PASD's U-Net and ControlNet."""
