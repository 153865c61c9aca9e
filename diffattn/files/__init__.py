"""Files: written whole or not at all, and weights read without running code."""
