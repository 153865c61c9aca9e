"""X-Portrait."""
