"""The denoising U-Net and its control branch."""
