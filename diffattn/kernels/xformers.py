"""Tiles through `xformers.ops.memory_efficient_attention`, for those who run their models on it. CUDA only.

The tiled kernel does everything but the attention of a tile. xformers takes the tile's mask as a bias: a tensor
`(batch, heads, queries, keys)` of the queries' dtype, with every stride but the last a multiple of 16 bytes, so rows
are laid out for a multiple of eight keys. As of 0.0.35 its kernel for such a bias is torch's own
`_efficient_attention_forward`, which SDPA picks as well: expect the speed of "tiled".
"""

import torch
from torch import Tensor

from .call import WindowCall
from .tiled import tiled_attention

ALIGNMENT = 8
"""Keys; 16 bytes in half precision."""


def xformers_refuses(call: WindowCall) -> str | None:
    """Why xformers can't serve `call`; None where it can."""
    try:
        import xformers.ops  # noqa: F401
    except ImportError as error:
        return f"xformers is not installed ({error}): pip install 'diffattn[xformers]'"
    if torch.compiler.is_compiling():
        return "an outer torch.compile is tracing"
    sizes = call.q.shape[-1], call.v.shape[-1]
    if any(size % ALIGNMENT for size in sizes):
        return f"xformers needs head sizes divisible by {ALIGNMENT}, got {sizes[0]} and {sizes[1]}"
    return None


def mask_as_bias(mask: Tensor, like: Tensor) -> Tensor:
    """`mask` (bool or additive, ending in queries x keys) as aligned numbers to add, of the dtype of `like`."""
    keys = mask.shape[-1]
    bias = like.new_zeros(*mask.shape[:-1], -(-keys // ALIGNMENT) * ALIGNMENT)[..., :keys]
    if mask.dtype == torch.bool:
        return bias.masked_fill_(~mask, -torch.inf)
    return bias.copy_(mask)


def memory_efficient_sdpa(q: Tensor, k: Tensor, v: Tensor, *, attn_mask: Tensor, scale: float) -> Tensor:
    """`F.scaled_dot_product_attention` of `(b, h, n, d)` by xformers, which has the heads behind the tokens."""
    import xformers.ops

    bias = mask_as_bias(attn_mask, q).expand(*q.shape[:2], -1, -1)
    q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
    return xformers.ops.memory_efficient_attention(q, k, v, attn_bias=bias, scale=scale).transpose(1, 2)


def xformers_attention(call: WindowCall) -> Tensor:
    """The tiled kernel with xformers for each row of tiles."""
    return tiled_attention(call, sdpa=memory_efficient_sdpa)
