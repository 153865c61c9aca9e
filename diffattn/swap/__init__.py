"""The swap: a model's own processors run, and the exit of each leads to a mechanism.

Read in this order: `apply` (the interface), `plan` (what is swapped, checked before anything changes), `model_swap`
(one model's processors and hooks), `intercept` (the exit of a processor), `layer` (one attention call), `calls` (what
is known of it while it runs), `report` (what ran).
"""

from .apply import Handle, apply, attn_processors, restore

__all__ = ["Handle", "apply", "attn_processors", "restore"]
