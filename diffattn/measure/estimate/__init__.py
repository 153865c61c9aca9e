"""What a swap would gain, before any run."""

from .estimate import Estimate, estimate

__all__ = ["Estimate", "estimate"]
