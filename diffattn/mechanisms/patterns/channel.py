"""Channel attention: the channels of a head attend to each other, over all tokens.

    A = softmax_j(f * sum_n w_n q_n,i k_n,j)        out_n,i = sum_j A_i,j v_n,j

i and j are channels of one group: `groups` parts each head's channels into so many, in order. The sum is over all
tokens n that ask, text included. So every token gets its own value, with its channels mixed by weights that all tokens
have a say in; nothing is moved from one place to another. Within a group of C_g channels

    scale_by="channels"     f = 1/sqrt(C_g), as published
    scale_by="tokens"       f = 1/sqrt(N), N = sum_n w_n: keeps a sum over more tokens from growing

A `scale` that a model gives takes the place of 1/sqrt(d) in both. A sum over thousands of tokens makes the softmax
nearly a choice of one channel, so "tokens" is for images of other sizes than in training.

A model's mask m over the keys, the same for all queries, weighs the tokens: w_n = exp(m_n - max m), so 1 or 0 for a
boolean mask. Where all is hidden every channel has the mean of its group.

This is another function than the softmax over tokens, and no setting is near it: a pretrained model must be trained
after the swap, as with `diffattn.distill`.

Source: Ding et al., DaViT: Dual Attention Vision Transformers, section on channel group attention,
https://arxiv.org/abs/2204.03645, for layers that take turns with windows; `scale_by="tokens"` is that of
`ChannelAttentionV2` in timm's DaViT. Differences: masks, text, groups within the heads of a model.

Time O(n d^2 / groups), memory O(n d + d^2) per head. Sums are taken in float32 at least.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor

from diffattn.config import register
from diffattn.grid import TokenGrid
from diffattn.options import Must, at_least

from ..base import Context, Mechanism, default_scale
from ..linear import weights_of_keys


@register("channel")
@dataclass(frozen=True, kw_only=True)
class ChannelAttention(Mechanism):
    """Channels of a head attend to each other. Time O(n d^2 / groups).

    >>> ChannelAttention().flops(TokenGrid(64, 64, before=512), heads=24, head_dim=128) / 1e9
    7.247757312
    """

    one_mask: ClassVar[bool] = True

    groups: Annotated[int, at_least(1)] = 1
    """Groups of a head's channels; it divides their number."""
    scale_by: Annotated[Literal["channels", "tokens"], Must("'channels' or 'tokens'")] = "channels"
    """What the sums over tokens are divided by the root of."""

    @property
    def backends(self) -> tuple[str, ...]:
        """One way: two matrix products."""
        return "auto", "dense"

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        grid: TokenGrid,
        *,
        scale: float | None = None,
        backend: str = "auto",
        context: Context = Context(),
    ) -> Tensor:
        self.check_backend(backend)
        self._check_channels(q, k, v, grid, context.mask)
        mask, weights = context.mask, None
        if mask is not None:
            weights = weights_of_keys(mask[(None,) * (4 - mask.dim())], q)
        if weights is not None:
            weights = weights.expand(-1, -1, grid.tokens, -1)[:, :, grid.query_slice]
        dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
        with torch.autocast(q.device.type, enabled=False):  # which would take the sums in half precision
            # b h groups n channels
            fine_q, fine_k, fine_v = (x.to(dtype).unflatten(-1, (self.groups, -1)).transpose(2, 3) for x in (q, k, v))
            asking, keys = fine_q[..., grid.query_slice, :], fine_k[..., grid.query_slice, :]
            if weights is not None:
                keys = keys * weights[:, :, None]
            logits = asking.mT @ keys * self._factor(q, grid, scale, weights)
            out = fine_v @ logits.softmax(-1).mT
        return out.transpose(2, 3).flatten(-2).to(q.dtype)

    def _factor(self, q: Tensor, grid: TokenGrid, scale: float | None, weights: Tensor | None) -> float | Tensor:
        """What multiplies the sums: a number, or one for each sample and head."""
        scale = default_scale(q) if scale is None else scale
        if self.scale_by == "channels":
            return float(scale * self.groups**0.5)
        root = float(scale * q.shape[-1] ** 0.5)
        if weights is None:
            return root / grid.queries**0.5
        tiny = torch.finfo(weights.dtype).tiny
        return root / weights.sum(2, keepdim=True)[..., None].clamp(min=tiny).sqrt()  # b h 1 1 1

    def reference(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        grid: TokenGrid,
        *,
        scale: float | None = None,
        context: Context = Context(),
    ) -> Tensor:
        """Channel by channel, one group after another."""
        self._check_channels(q, k, v, grid, context.mask)
        mask = torch.ones(grid.tokens, dtype=torch.bool, device=q.device) if context.mask is None else context.mask
        mask = mask[(None,) * (4 - mask.dim())].expand(-1, -1, -1, grid.tokens)
        if mask.dtype != torch.bool:
            mask = (mask - mask.amax(-1, keepdim=True).clamp(min=torch.finfo(mask.dtype).min)).exp()
        asking = torch.zeros_like(mask[:, :, 0], dtype=q.dtype)  # b h n
        asking[..., grid.query_slice] = mask[:, :, 0, grid.query_slice].to(q.dtype)
        size = q.shape[-1] // self.groups
        own = default_scale(q) if scale is None else scale
        out = torch.zeros_like(v)
        for first in range(0, q.shape[-1], size):
            group = range(first, first + size)
            for i in group:
                logits = torch.stack([(asking * q[..., i] * k[..., j]).sum(-1) for j in group], dim=-1)  # b h channels
                divisor = (
                    asking.sum(-1, keepdim=True) if self.scale_by == "tokens" else torch.tensor(size, dtype=q.dtype)
                )
                shares = (own * q.shape[-1] ** 0.5 * logits / divisor.clamp(min=1e-300).sqrt()).softmax(-1)
                mixed = sum(shares[..., None, j - first] * v[..., j] for j in group)
                out = torch.cat([out[..., :i], mixed[..., None], out[..., i + 1 :]], dim=-1)
        return out

    def _check_channels(self, q: Tensor, k: Tensor, v: Tensor, grid: TokenGrid, mask: Tensor | None) -> None:
        grid.check(q, k)
        if mask is not None and mask.dim() > 1 and mask.shape[-2] != 1:
            raise ValueError(
                f"channel: all queries are summed up together, so a mask must be the same for all of them, "
                f"(b, 1, 1, keys), got {tuple(mask.shape)}; leave layers with such a mask out with layers="
            )
        channels = q.shape[-1]
        if v.shape[-1] != channels:
            raise ValueError(
                f"channel: a value's channels are mixed by weights of those of queries and keys, so there must be as "
                f"many, got {channels} and {v.shape[-1]}; leave such layers out with layers="
            )
        if channels % self.groups:
            raise ValueError(
                f"channel: groups={self.groups} must divide the {channels} channels of a head; use another number, or "
                f"leave such layers out with layers="
            )

    def flops(self, grid: TokenGrid, heads: int, head_dim: int, *, context: Context = Context()) -> int:
        """The products that make the weights, and those that use them."""
        return 2 * (grid.queries + grid.tokens) * heads * head_dim * (head_dim // self.groups)
