"""X-Portrait's networks."""
