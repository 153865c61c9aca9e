"""What every attention mechanism is: a frozen config that can attend, count its cost and check a grid."""

from dataclasses import dataclass, fields
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from .. import config, options
from ..grid import TokenGrid
from ..kernels.order import TileOrder
from ..kernels.pattern import Pattern

LARGEST = 2**31 - 1
"""Of all numbers in options but seeds: squares of sizes are computed in 64 bits."""


@dataclass(frozen=True)
class Context:
    """What an attention call carries beside queries, keys, values and grid. Every field may be absent."""

    mask: Tensor | None = None
    """The model's own mask (padded text): bool (True = may be seen) or additive, broadcastable to (b, h, n, m)."""
    weights: nn.Module | None = None
    """This layer's trained weights, made by `Mechanism.weights`."""
    features: Tensor | None = None
    """The block's input before its norm, (b, n, channels): what token merging compares."""
    hidden: Tensor | None = None
    """What the attention module is given, from which it makes queries, keys and values, (b, n, channels)."""
    progress: float | None = None
    """Share of the schedule, from pure noise on, that is behind, in [0, 1); None outside a pipeline."""
    timestep: float | None = None
    """The timestep as the model got it; of several in a batch the largest."""
    sigma: float | None = None
    """Share of noise in the latents, in [0, 1]: flow matching's sigma, and 1/(1 + sqrt(SNR)) of any scheduler."""
    downsample: int = 1
    """How many times coarser this layer's grid is than the latent image, along one side."""
    call_index: int = 0
    """Number of this layer among the swapped ones: lets seeded mechanisms differ from layer to layer."""
    first_head: int = 0
    """Number of the first head of q, k and v among the layer's, where other heads are computed elsewhere."""
    order: TileOrder | None = None
    """In which the cells of q, k, v come, and the output is to leave: the one that `Mechanism.cell_order` gave. None:
    row-major."""
    memory: dict[str, Any] | None = None
    """What this mechanism kept in an earlier step, to read and to fill: its own for each run, layer, sample (prompt and
    guidance branch) and shape, empty at their first call. None outside a pipeline and in training."""


class Seen(NamedTuple):
    """What queries see. Samples and heads are 1 where all see alike."""

    keys: Tensor
    """Which keys they see each by itself, bool `(b|1, h|1, n, n)`."""
    means: Tensor
    """Which blocks of cells they see by their mean, bool `(b|1, h|1, n, blocks)`."""
    blocks: Tensor
    """Which cells are in each block, bool `(b|1, h|1, blocks, cells)`."""


@dataclass(frozen=True, kw_only=True)
class Mechanism:
    """Base of all mechanisms: subclass, decorate with `@dataclass(frozen=True, kw_only=True)` and `@register(name)`.

    A subclass writes `reference` (slow, obviously right, float64-able, differentiable), `attend` (fast, the same
    result) and `flops`. Wrong options raise in `__post_init__`, wrong grids in `check`; the maths trusts both. A
    `__post_init__` of its own begins by `super().__post_init__()`, which holds the options to their annotations
    (`diffattn.options`): what is left to it are relations between them.
    """

    type: ClassVar[str]
    kinds: ClassVar[frozenset[str]] = frozenset({"spatial"})
    """Layers that `apply` gives it by default: "spatial" (images, and video cells seen at once) or "temporal"."""
    across_frames: ClassVar[bool] = False
    """Does it change nothing within a frame? Then models with layers along the frames keep the others by default."""
    across_rows: ClassVar[bool] = False
    """Does a single row see itself whole? Then it saves nothing on a line in time, such as audio."""
    joins_grids: ClassVar[bool] = False
    """Are grids of one size in a sequence frames of one grid to it? Else they see each other exactly."""
    one_mask: ClassVar[bool] = False
    """Must a mask be the same for all queries?"""

    @property
    def exact(self) -> bool:
        """Is the result the model's own attention? Then a swapped layer hands the call to the model's own kernel."""
        return False

    @property
    def approximates(self) -> bool:
        """Does it stay near the model's own attention without training? Then `apply` warns of no other images."""
        return False

    def __post_init__(self) -> None:
        name = getattr(self, "type", type(self).__name__)
        options.check_fields(self, name)
        for field in fields(self):
            value = getattr(self, field.name)
            numbers = value if isinstance(value, tuple) else (value,)
            if field.name != "seed" and any(isinstance(n, (int, float)) and abs(n) > LARGEST for n in numbers):
                raise ValueError(f"{name}: {field.name} must be at most {LARGEST}, got {options.shown(value)}")

    @property
    def scales(self) -> bool:
        """Does it take about the same share of all pairs at every size? Then a recipe carries over to other sizes."""
        return False

    @property
    def grouped_heads(self) -> bool:
        """May keys and values have fewer heads than the queries (grouped-query attention)?"""
        return False

    @property
    def needs(self) -> frozenset[str]:
        """Fields of `Context` this config reads beside `mask` and `weights`; the others are left at their defaults."""
        return frozenset()

    @property
    def leaves_tiles(self) -> bool:
        """Are the cells that it does not see exactly whole tiles? Then `attend` takes `beside`, which may add to them
        (`parts/exact_tiles.py`).
        """
        return False

    def left_tiles(self, grid: TokenGrid) -> tuple[int, int] | None:
        """Tiles of queries and of keys, where not all are exact; None where all cells are."""
        return None

    @property
    def needs_steps(self) -> bool:
        """Can it compute nothing without `Context.progress`? Then `apply` refuses models without their pipeline."""
        return False

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
        """Attention output `(b, h, n, c)` for `q` `(b, h, n, d)`, `k` `(b, h, m, d)` and `v` `(b, h, m, c)`.

        `scale` multiplies the logits (None: 1/sqrt(d)). `backend` names a kernel; "auto" picks the fastest that fits.
        """
        raise NotImplementedError

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
        """The same result as `attend`, of the same shapes, written the slow and plain way; meant for float64."""
        raise NotImplementedError

    def pattern(self, grid: TokenGrid) -> Pattern | None:
        """The rule that says which cells of `grid` see each other, for mechanisms that are a window."""
        return None

    @property
    def only_pattern(self) -> bool:
        """Does a cell see of the grid just what `pattern` says, each key by itself, and no means beside them?"""
        return False

    def cell_order(self, q: Tensor, grid: TokenGrid, backend: str) -> TileOrder | None:
        """The order of the cells in which the kernel for `q` `(b, h, n, d)` computes, without gradients; None: any."""
        return None

    def mask(self, grid: TokenGrid) -> Tensor:
        """Dense boolean `(queries, keys)`, True = may be seen. Only mechanisms that are a mask have one."""
        raise NotImplementedError(f"{self.type} is not a mask over the tokens")

    def head_masks(self, grid: TokenGrid) -> tuple[tuple[str, Tensor], ...]:
        """Masks `(queries, keys)` of the kinds of heads, each with words for it; one without words if all are alike."""
        return (("", self.mask(grid)),)

    def seen(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        grid: TokenGrid,
        *,
        scale: float | None = None,
        context: Context = Context(),
    ) -> Seen:
        """What each query of a call (shapes of `attend`) sees, if it is a softmax of keys and means. Memory O(n^2)."""
        keys = self.mask(grid)[None, None, :, : grid.tokens]
        nothing = torch.zeros(1, 1, 1, 0, dtype=torch.bool)
        return Seen(keys, nothing.expand(-1, -1, grid.tokens, -1), nothing.mT.expand(-1, -1, -1, grid.cells))

    def flops(self, grid: TokenGrid, heads: int, head_dim: int, *, context: Context = Context()) -> int:
        """Floating-point operations of one call for one sample; a multiply-add counts as two."""
        raise NotImplementedError

    @property
    def backends(self) -> tuple[str, ...]:
        """Names that `attend` takes as `backend`."""
        return ("auto",)

    def explain_backend(self, q: Tensor, k: Tensor, v: Tensor, grid: TokenGrid, backend: str, context: Context) -> str:
        """Which kernel `attend` runs and why, for `diffattn.summary`; only shapes, dtypes and devices are looked at."""
        return backend

    def check_backend(self, backend: str) -> None:
        """Raise `ValueError` for a backend that this mechanism does not have."""
        if backend not in self.backends:
            raise ValueError(f"{self.type} has no backend {backend!r}; it has {', '.join(self.backends)}")

    def check(self, grid: TokenGrid, *, context: Context = Context()) -> None:
        """Raise `ValueError` where this config cannot serve `grid`."""

    def weights(self, heads: int, head_dim: int) -> nn.Module | None:
        """Fresh trainable weights for one layer, or None where the mechanism has none."""
        return None

    def to_dict(self) -> dict[str, Any]:
        """`{"type": short name, option: value, ...}`; `diffattn.config.from_dict` undoes it."""
        return config.to_dict(self)

    def __str__(self) -> str:
        options = ", ".join(f"{key}={value}" for key, value in changed_options(self).items())
        return f"{self.type}({options})"


def changed_options(mechanism: Mechanism) -> dict[str, Any]:
    """The options that differ from their defaults."""
    values = mechanism.to_dict()
    fields = type(mechanism).__dataclass_fields__
    return {
        name: value
        for name, value in values.items()
        if name != "type" and getattr(mechanism, name) != fields[name].default
    }


def default_scale(q: Tensor) -> float:
    """1/sqrt(d)."""
    return float(q.shape[-1] ** -0.5)


def mask_as(mask: Tensor | None, q: Tensor) -> Tensor | None:
    """A model's mask as SDPA takes it: four axes, bool or additive in the dtype of the queries."""
    if mask is None:
        return None
    mask = mask[(None,) * (4 - mask.dim())]
    return mask if mask.dtype == torch.bool else mask.to(q.dtype)
