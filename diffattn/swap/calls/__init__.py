"""What is known of a running attention call: its forward, its grid, its denoising step, and what became of it."""
