"""The reference kernel: exact attention under a dense mask. Time and memory O(n m)."""

import torch
from torch import Tensor


def combine_masks(pattern: Tensor, mask: Tensor | None) -> Tensor:
    """The boolean `pattern` `(n, m)` and the model's own `mask` (bool or additive, `(b|1, h|1, n|1, k)`, k <= m).

    Pooled keys at the end, of which the model's mask knows nothing, are left visible.
    """
    if mask is None:
        return pattern
    visible = mask.dtype == torch.bool
    mask = torch.nn.functional.pad(mask, (0, pattern.shape[-1] - mask.shape[-1]), value=visible)
    return pattern & mask if visible else mask.masked_fill(~pattern, -torch.inf)
