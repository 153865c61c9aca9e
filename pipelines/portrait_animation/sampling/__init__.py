"""The steps of a run, from control images to denoised latents."""
