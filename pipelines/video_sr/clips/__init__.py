"""Long clips: frames read, kept and worked through a few at a time."""
