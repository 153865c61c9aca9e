"""What is compared: mechanisms of a share, outputs used again, and a choice that knows the errors."""

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import PyramidAttentionBroadcastConfig
from torch import Tensor

import diffattn
from diffattn import (
    ClearAttention,
    HaloAttention,
    Mechanism,
    NeighborhoodAttention,
    RoutingAttention,
    SoftmaxAttention,
    TokenGrid,
)
from diffattn.config import register
from diffattn.kernels.routed.select import first_tiles
from diffattn.mechanisms.base import Context, default_scale
from diffattn.mechanisms.parts.exact_tiles import Beside, members


@dataclass(frozen=True)
class Method:
    """One row: a mechanism, and in how many steps it is computed."""

    name: str
    mechanism: Mechanism
    reuse: int = 1
    last: bool = True
    """Is the last step computed, whatever its number?"""
    exact_frames: tuple[int, int] = (0, 0)

    @contextlib.contextmanager
    def on(self, pipe: Any) -> Iterator[None]:
        """The pipeline under this method."""
        with diffattn.apply(pipe, self.mechanism, reuse=self.reuse, exact_frames=self.exact_frames):
            yield

    def share(self, grid: TokenGrid, steps: range) -> float:
        """Pairs that are computed over all, in a run through `steps`."""
        first, last = steps[0], steps[-1]
        computed = [(step - first) % self.reuse == 0 or (self.last and step == last) for step in steps]
        return share_of(self.mechanism, grid.with_exact_frames(*self.exact_frames)) * sum(computed) / len(computed)


@dataclass(frozen=True)
class Broadcast(Method):
    """Pyramid Attention Broadcast of diffusers: outputs of whole layers, from one of `reuse` steps."""

    mechanism: Mechanism = field(default_factory=SoftmaxAttention)
    last: bool = False

    @contextlib.contextmanager
    def on(self, pipe: Any) -> Iterator[None]:
        config = PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=self.reuse,
            spatial_attention_timestep_skip_range=(-1, 1001),
            current_timestep_callback=lambda: 500,
        )
        pipe.transformer.enable_cache(config)
        try:
            yield
        finally:
            pipe.transformer.disable_cache()


@register("oracle")
@dataclass(frozen=True, kw_only=True)
class OracleRouting(RoutingAttention):
    """`routing` that chooses by the errors themselves, which it takes full attention to know."""

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
        beside: Beside | None = None,
    ) -> Tensor:
        """By the reference, whatever `backend` says; nothing stands `beside` it."""
        scale = default_scale(q) if scale is None else scale
        call = self.call(q, k, v, grid, scale, context.mask, None)
        errors = self.errors(q, k, v, grid, scale)
        chosen = first_tiles(call, slice(None), errors.flatten(0, 1)).unflatten(0, q.shape[:2])
        return self.reference(q, k, v, grid, scale=scale, context=context, chosen=chosen)

    def errors(self, q: Tensor, k: Tensor, v: Tensor, grid: TokenGrid, scale: float) -> Tensor:
        """Of each tile of queries, the mean square error of its outputs if a tile counts by means alone."""
        sides = self.sides(grid)
        tiles, blocks = (x[0, 0] for x in members(k, grid, sides, None))
        cells_q, cells_k, cells_v = (grid.split(x)[0] for x in (q, k, v))
        count = blocks.sum(1, keepdim=True)
        mean_k, mean_v = (blocks @ x / count for x in (cells_k, cells_v))
        lse = (scale * cells_q @ k.mT).logsumexp(-1, keepdim=True)
        exact = (scale * cells_q @ cells_k.mT - lse).exp()
        pooled = (scale * cells_q @ mean_k.mT + count.log().mT - lse).exp()
        found = []
        for own, means in zip(tiles > 0, tiles @ blocks.mT > 0, strict=True):
            off = exact[..., own] @ cells_v[..., own, :] - pooled[..., means] @ mean_v[..., means, :]
            found.append(off.square().sum(-1))
        mine = members(k, grid, sides._replace(tile=sides.asking, block=sides.asking), None)[0][0, 0]
        return (mine @ torch.stack(found, -1)) / mine.sum(1)[:, None]


def clear_of(share: float, grid: TokenGrid, **options: Any) -> ClearAttention:
    """CLEAR with the largest radius whose share is no larger."""
    radii = (radius / 10 for radius in range(10, 10 * grid.height))
    return _nearest((ClearAttention(radius=radius, **options) for radius in radii), share, grid)


def halo_of(share: float, grid: TokenGrid, tiles: tuple[int, ...] = (2, 4, 8), **options: Any) -> HaloAttention:
    """Halo attention of the tile and radius with the largest share that is no larger."""
    several = (HaloAttention(tile=tile, radius=r / 2, **options) for tile in tiles for r in range(3, 2 * grid.height))
    return _nearest(several, share, grid)


def neighborhood_of(share: float, grid: TokenGrid, **options: Any) -> NeighborhoodAttention:
    """Neighborhood attention of the largest kernel whose share is no larger."""
    several = (NeighborhoodAttention(kernel_size=size, **options) for size in range(1, grid.height))
    return _nearest(several, share, grid)


def _nearest(several: Iterable[Any], share: float, grid: TokenGrid) -> Any:
    return max((m for m in several if share_of(m, grid) <= share), key=lambda mechanism: share_of(mechanism, grid))


def share_of(mechanism: Mechanism, grid: TokenGrid) -> float:
    """Pairs that a mechanism computes over all."""
    if isinstance(mechanism, RoutingAttention):
        return mechanism.share_on(grid)
    return mechanism.flops(grid, 1, 64) / (4 * 64 * grid.tokens**2)
