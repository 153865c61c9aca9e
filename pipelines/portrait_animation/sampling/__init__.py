"""The steps of a run, from control pictures to denoised latents."""
