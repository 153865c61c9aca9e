"""Video models on clips: one file and one row (`ClipFamily`) for each."""
