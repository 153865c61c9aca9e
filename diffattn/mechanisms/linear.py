"""Linear attention: a product of feature maps in place of the softmax, so that keys and values are summed up once.

    division       out_i = sum_j w_j (f_i g_j) v_j / (sum_j w_j (f_i g_j) + eps)
    subtraction    out_i = sum_j p_j (1 + f_i g_j - sum_l p_l f_i g_l) v_j           p = w / sum_j w_j
    f_i = phi(sqrt(scale) q_i),   g_j = phi(sqrt(scale) k_j)

with phi one of

    elu        elu(x) + 1
    relu       max(x, 0): its quotient does not depend on `scale`
    identity   x, for subtraction only: all weights together are then the softmax to first order in `scale`
    learned    [exp(W x), exp(-W x)], one W per head for queries and one for keys, trained (`linear_weights.py`)

An untrained one is not an approximation of the softmax but another function: a pretrained model needs training after
the swap, as with `diffattn.distill`. `local_residual` adds a trained local filter of the values to the cells of the
grid, which gives back some of the locality that sums lack.

All tokens, text included, are in the sums. A model's mask m over the keys, the same for all queries, weighs them:
w_j = exp(m_j), as it does in a softmax, so w_j is 1 or 0 for a boolean mask. Where all is hidden the result is 0. The
local residual takes hidden cells for 0.

Sources: elu: Katharopoulos et al., Transformers are RNNs, equations 5-7, https://arxiv.org/abs/2006.16236. Subtraction,
identity and local residual: Han et al., Bridging the Divide, equation 5, https://arxiv.org/abs/2412.06590, whose
injectivity gave it the name InLine; the factor 1/N on its products is that of the released code. Learned maps: Zhang et
al., The Hedgehog & the Porcupine, https://arxiv.org/abs/2402.04347. Differences: masks, text, any grid.

Time O(n d^2), memory O(n d + d^2) per head. Sums are taken in float32 at least.
"""

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from ..config import register
from ..grid import TokenGrid
from ..options import POSITIVE, Must
from .base import Context, Mechanism, default_scale
from .parts.linear_weights import LinearWeights, plus_minus

FEATURE_MAPS = ("elu", "relu", "identity", "learned")
NORMALIZATIONS = ("division", "subtraction")


BOX = Must(
    "([[frames,] rows,] columns), odd ints, or ()",
    lambda box: len(box) <= 3 and all(side >= 1 and side % 2 for side in box),
)


@register("linear")
@dataclass(frozen=True, kw_only=True)
class LinearAttention(Mechanism):
    """Linear attention, plain, injective (InLine) or with learned feature maps. Time O(n d^2).

    >>> LinearAttention().flops(TokenGrid(64, 64, before=512), heads=24, head_dim=128) / 1e9
    7.276068864
    """

    one_mask: ClassVar[bool] = True

    feature_map: str = "elu"
    """What queries and keys go through: elu, relu, identity or learned."""
    normalization: str = "division"
    """How weights are made to sum to 1: by division, or by subtraction, which keeps different queries apart."""
    local_residual: Annotated[tuple[int, ...], BOX] = ()
    """Sides of the trained local filter along ([frames,] rows,) columns, odd, such as (3, 3); () for none."""
    eps: Annotated[float, POSITIVE] = 1e-15
    """Added to the sum that is divided by, so that a query whose features meet no key's gives 0."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, known in (("feature_map", FEATURE_MAPS), ("normalization", NORMALIZATIONS)):
            if getattr(self, name) not in known:
                raise ValueError(f"linear: {name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")
        if self.feature_map == "identity" and self.normalization == "division":
            raise ValueError(
                'linear: feature_map="identity" has products of either sign, whose sum can be 0; use '
                'normalization="subtraction" with it'
            )
        if self.feature_map == "learned" and self.normalization == "subtraction":
            raise ValueError('linear: feature_map="learned" is made for normalization="division"; leave that out')

    @classmethod
    def inline(cls) -> "LinearAttention":
        """The published injective form for images: subtraction and a 3 x 3 local residual."""
        return cls(feature_map="identity", normalization="subtraction", local_residual=(3, 3))

    @property
    def backends(self) -> tuple[str, ...]:
        """One way: two matrix products."""
        return "auto", "dense"

    @property
    def residual(self) -> tuple[int, int, int] | None:
        """The local filter's sides along frames, rows and columns."""
        if not self.local_residual:
            return None
        frames, rows, columns = (1, 1, *self.local_residual)[-3:]
        return frames, rows, columns

    def weights(self, heads: int, head_dim: int) -> LinearWeights | None:
        learned = self.feature_map == "learned"
        if not learned and self.residual is None:
            return None
        return LinearWeights(heads, head_dim, maps=learned, residual=self.residual)

    def _weights(self, context: Context) -> LinearWeights | None:
        """The layer's weights; None is their start: maps that are the identity, and no residual."""
        if context.weights is not None and not isinstance(context.weights, LinearWeights):
            raise ValueError(
                f"linear: Context.weights must come from mechanism.weights(heads, head_dim), got a "
                f"{type(context.weights).__name__}"
            )
        return context.weights

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
        grid.check(q, k)
        root = root_of_scale(q, scale)
        weights, key_weights = self._weights(context), weights_of_keys(context.mask, q)
        dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
        # autocast would take the sums in half precision again
        with torch.autocast(q.device.type, enabled=False):
            fine_q, fine_k, fine_v = q.to(dtype) * root, k.to(dtype) * root, v.to(dtype)
            if self.feature_map == "learned":
                f, g = learned_features(fine_q, fine_k, weights, key_weights)
                out = divide(f, g, fine_v, self.eps)
            elif self.normalization == "division":
                f, g = plain_features(self.feature_map, fine_q), plain_features(self.feature_map, fine_k)
                out = divide(f, g if key_weights is None else g * key_weights, fine_v, self.eps)
            else:
                f, g = plain_features(self.feature_map, fine_q), plain_features(self.feature_map, fine_k)
                out = subtract(f, g, fine_v, key_weights)
            if weights is not None and weights.residual is not None:
                visible = None if key_weights is None else key_weights > 0
                local = weights.local(fine_v, grid, visible)
                out = F.pad(local, (0, 0, grid.before, grid.after)) + out
        return out.to(q.dtype)

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
        """All n x n weights; time and memory O(n^2)."""
        root = root_of_scale(q, scale)
        weights, mask = self._weights(context), key_mask(context.mask)
        if self.feature_map == "learned":
            q_logs, k_logs = weights.map_logs(q * root, k * root) if weights else map(plus_minus, (q * root, k * root))
            f, g = q_logs.exp(), k_logs.exp()
        else:
            f, g = plain_features(self.feature_map, q * root), plain_features(self.feature_map, k * root)
        products = f @ g.transpose(-1, -2)  # b h n m
        if mask is None:
            mask = torch.ones(1, 1, 1, k.shape[-2], dtype=torch.bool, device=q.device)
        key_weights = mask.to(q.dtype) if mask.dtype == torch.bool else mask.exp()
        if self.normalization == "division":
            attention = products * key_weights
            attention = attention / (attention.sum(dim=-1, keepdim=True) + self.eps)
        else:
            total = key_weights.sum(dim=-1, keepdim=True)
            shares = key_weights / torch.where(total == 0, torch.ones_like(total), total)
            attention = shares * (1 + products - (shares * products).sum(dim=-1, keepdim=True))
        out = attention @ v
        if weights is None or weights.residual is None:
            return out
        local = weights.local_reference(v, grid, key_weights.transpose(-1, -2) > 0)
        cells, others = grid.split(out)
        return grid.join(cells + local, others)

    def flops(self, grid: TokenGrid, heads: int, head_dim: int, *, context: Context = Context()) -> int:
        """Products of sums and queries, of learned maps, and of the local residual."""
        learned = self.feature_map == "learned"
        features = 2 * head_dim if learned else head_dim
        products = 4 * grid.tokens * features * head_dim
        if self.normalization == "division":
            products += 2 * grid.tokens * features
        if learned:
            products += 4 * grid.tokens * head_dim**2
        if self.residual is not None:
            offsets = math.prod(self.residual)
            products += 2 * offsets * grid.cells * head_dim + 2 * (1 + offsets) * head_dim**2
        return products * heads


def root_of_scale(q: Tensor, scale: float | None) -> float:
    """The square root of `scale`, which goes to queries and keys alike."""
    scale = default_scale(q) if scale is None else scale
    if scale < 0:
        raise ValueError(
            f"linear: scale goes to queries and keys by its square root and must be at least 0, got {scale}"
        )
    return math.sqrt(scale)


def key_mask(mask: Tensor | None) -> Tensor | None:
    """`mask`, after making sure that it is the same for all queries."""
    if mask is not None and mask.dim() > 1 and mask.shape[-2] != 1:
        raise ValueError(
            f"linear: keys are summed up once for all queries, so a mask must be the same for all of them, "
            f"(b, 1, 1, keys), got {tuple(mask.shape)}; leave layers with such a mask out with layers="
        )
    return mask


def weights_of_keys(mask: Tensor | None, q: Tensor) -> Tensor | None:
    """w `(b, h, keys, 1)` for a boolean or additive key mask, in float32 at least; the greatest is 1."""
    mask = key_mask(mask)
    if mask is None:
        return None
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    if mask.dtype == torch.bool:
        weights = mask.to(dtype)
    else:
        mask = mask.to(dtype)
        weights = (mask - mask.amax(dim=-1, keepdim=True).clamp(min=torch.finfo(dtype).min)).exp()
    return weights.unsqueeze(-1) if mask.dim() == 1 else weights.transpose(-1, -2)


def plain_features(name: str, x: Tensor) -> Tensor:
    """phi(x) of the maps without weights."""
    if name == "elu":
        return F.elu(x) + 1
    return F.relu(x) if name == "relu" else x


def learned_features(
    q: Tensor, k: Tensor, weights: LinearWeights | None, key_weights: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Features of `q` and weighted features of `k`, shifted so that no exponential overflows.

    A factor of its own for each query, and one for all keys, cancel in the quotient.
    """
    f, g = weights.map_logs(q, k) if weights is not None else (plus_minus(q), plus_minus(k))
    if key_weights is not None:
        g = g + key_weights.log()
    lowest = torch.finfo(g.dtype).min
    f_peak, g_peak = f.detach().amax(dim=-1, keepdim=True), g.detach().amax(dim=(-2, -1), keepdim=True)
    return (f - f_peak).exp(), (g - g_peak.clamp(min=lowest)).exp()


def divide(f: Tensor, g: Tensor, v: Tensor, eps: float) -> Tensor:
    """sum_j (f_i g_j) v_j / (sum_j f_i g_j + eps)."""
    summed, total = g.transpose(-1, -2) @ v, g.sum(dim=-2).unsqueeze(-1)  # b h features c, b h features 1
    return f @ summed / (f @ total + eps)


def subtract(f: Tensor, g: Tensor, v: Tensor, key_weights: Tensor | None) -> Tensor:
    """sum_j p_j (1 + f_i g_j - sum_l p_l f_i g_l) v_j = mean v + f_i times the covariance of g and v."""
    if key_weights is None:
        share: Tensor | float = 1 / g.shape[-2]
    else:
        total = key_weights.sum(dim=-2, keepdim=True)
        share = key_weights / torch.where(total == 0, torch.ones_like(total), total)
    mean_g, mean_v = (g * share).sum(dim=-2, keepdim=True), (v * share).sum(dim=-2, keepdim=True)
    covariance = ((g - mean_g) * share).transpose(-1, -2) @ v
    return mean_v + f @ covariance
