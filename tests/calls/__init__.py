"""The calls that the pipelines of diffusers make, on tiny random models: what they pass beside the models' inputs."""

from .values import IMPOSSIBLE, PLAIN, VALUES
from .variants import VARIANTS

__all__ = ["IMPOSSIBLE", "PLAIN", "VALUES", "VARIANTS"]
