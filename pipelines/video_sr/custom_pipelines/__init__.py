"""Folders for the `custom_pipeline=` of diffusers: one pipeline class in each."""
