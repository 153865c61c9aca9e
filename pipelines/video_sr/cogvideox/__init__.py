"""STAR on CogVideoX-5B."""
