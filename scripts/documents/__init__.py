"""What the pages below docs/ are made by."""
