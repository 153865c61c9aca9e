"""The swap: a model's own processors run, and the exit of each leads to a mechanism.

Read in this order: `apply` (the interface), `plan` (what is swapped, checked before anything changes), `model_swap`
(one model's processors and hooks), `intercept` (the exit of a processor), `layer` (one attention call), `calls` (what
is known of it while it runs), `report` (what ran). `exact` is apart: a model's own windows in bounded memory.
"""

from .apply import Handle, apply, attn_processors, restore
from .exact import ExactHandle, apply_exact

__all__ = ["ExactHandle", "Handle", "apply", "apply_exact", "attn_processors", "restore"]
