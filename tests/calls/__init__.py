"""The calls that the pipelines of diffusers make, on tiny random models: what they pass beside the models' inputs."""

from .values import PLAIN, VALUES
from .variants import VARIANTS

__all__ = ["PLAIN", "VALUES", "VARIANTS"]
