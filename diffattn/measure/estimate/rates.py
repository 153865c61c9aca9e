"""Seconds of what a forward computes: measured on this machine, or modelled from a GPU's data sheet.

Measured: each kind of attention call on random numbers, full and by its mechanism, in interleaved rounds; all else by
one forward whose attention gives its values back. Calls that would take long are measured on a smaller grid and scaled
by their floating-point operations; the source of the figures says so.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...grid import TokenGrid
from ...mechanisms.base import Context, Mechanism
from ...mechanisms.routing import RoutingAttention
from ...swap.apply import apply
from ..cost import as_in_a_model
from ..hardware import hardware, hardware_line
from ..latency import latency, synchronize
from ..modelled import CARDS, HALF, MATMUL, Card, Part, full_parts, routing_parts, seconds, window_parts
from .inputs import make_inputs
from .work import HALFWAY, AttentionCall, Work

Pair = tuple[float, float]
"""Seconds of full attention, and of a mechanism."""
MOST_FLOPS = 4e10
"""Of a call that is measured at its own size."""
ROUNDS = 3


class Rates(Protocol):
    """Where the figures come from."""

    @property
    def source(self) -> str:
        """In words, for who reads the figures."""
        ...

    def attention(self, call: AttentionCall, mechanism: Mechanism) -> Pair:
        """Seconds of one call for one sample: full, and by `mechanism`."""
        ...

    def at(self, call: AttentionCall, mechanism: Mechanism, grid: TokenGrid, known: Pair) -> Pair:
        """The same on another grid, where those of the call's own are `known`."""
        ...

    def rest(self, work: Work) -> float:
        """Seconds of all else in one forward for one sample."""
        ...


@dataclass
class DataSheet:
    """A GPU that is not here, in bfloat16."""

    card: Card

    @property
    def source(self) -> str:
        return f"modelled from the data sheet of {self.card.name}, not measured"

    def attention(self, call: AttentionCall, mechanism: Mechanism) -> Pair:
        full = full_parts(call.grid, call.heads, call.head_dim)
        return seconds(full, self.card), seconds(_parts(call, mechanism), self.card)

    def at(self, call: AttentionCall, mechanism: Mechanism, grid: TokenGrid, known: Pair) -> Pair:
        return self.attention(replace(call, grid=grid), mechanism)

    def rest(self, work: Work) -> float:
        return Part("rest", work.rest, work.weights * HALF, MATMUL).seconds(self.card)


def _parts(call: AttentionCall, mechanism: Mechanism) -> list[Part]:
    """What `mechanism` does in a call, as `modelled` has it; by its operations alone where it has no row there."""
    shape = call.grid, call.heads, call.head_dim
    if mechanism.exact:
        return full_parts(*shape)
    if isinstance(mechanism, RoutingAttention):
        return routing_parts(mechanism, *shape)
    pattern = mechanism.pattern(call.grid)
    if pattern is not None and mechanism.only_pattern:
        return window_parts(pattern, *shape)
    moved = 4 * call.grid.tokens * call.heads * call.head_dim * HALF
    return [Part(mechanism.type, mechanism.flops(*shape, context=HALFWAY), moved)]


@dataclass
class Measured:
    """This machine."""

    model: nn.Module
    text: int
    like: Tensor
    """Has the device and dtype."""

    @property
    def source(self) -> str:
        return f"measured on {hardware_line(hardware(self.like.device))}"

    def attention(self, call: AttentionCall, mechanism: Mechanism) -> Pair:
        grid = smaller(call.grid, lambda grid: 4 * grid.pairs * call.heads * call.head_dim)
        generator = torch.Generator().manual_seed(0)
        shape = 1, call.heads, grid.tokens, call.head_dim
        q, k, v = (torch.randn(shape, generator=generator).to(self.like) for _ in range(3))
        functions: dict[str, Callable[[], Any]] = {"full": lambda: F.scaled_dot_product_attention(q, k, v)}
        if not mechanism.exact:
            own = as_in_a_model(mechanism, q)
            context = replace(HALFWAY, weights=own.weights, hidden=own.hidden)
            functions["own"] = lambda: mechanism.attend(q, k, v, grid, context=context)
        with torch.no_grad():
            times = latency(functions, rounds=ROUNDS, device=self.like.device)
        full = times["full"].min * (call.grid.tokens / grid.tokens) ** 2
        if mechanism.exact:
            return full, full
        work = [mechanism.flops(each, call.heads, call.head_dim, context=HALFWAY) for each in (call.grid, grid)]
        return full, times["own"].min * work[0] / work[1]

    def at(self, call: AttentionCall, mechanism: Mechanism, grid: TokenGrid, known: Pair) -> Pair:
        work = [mechanism.flops(each, call.heads, call.head_dim, context=HALFWAY) for each in (grid, call.grid)]
        return known[0] * (grid.tokens / call.grid.tokens) ** 2, known[1] * work[0] / work[1]

    def rest(self, work: Work) -> float:
        grid = max((call.grid for call in work.calls), key=lambda grid: grid.tokens)
        part = smaller(grid, lambda grid: work.rest * grid.tokens / max(call.grid.tokens for call in work.calls))
        inputs = make_inputs(self.model, part, self.text, 1, self.like)
        with torch.no_grad(), apply(self.model, Nothing(), layers=None):
            times = latency({"rest": lambda: self.model(**inputs)}, rounds=ROUNDS, device=self.like.device)
        synchronize(self.like.device)
        return times["rest"].min * grid.tokens / part.tokens


def smaller(grid: TokenGrid, flops: Callable[[TokenGrid], float]) -> TokenGrid:
    """The grid, or one of the same form whose call takes at most `MOST_FLOPS`."""
    shrunk = grid
    for parts in range(1, max(grid.height, grid.width) + 1):
        side = math.sqrt(parts)
        shrunk = replace(grid, height=max(1, round(grid.height / side)), width=max(1, round(grid.width / side)))
        if flops(shrunk) <= MOST_FLOPS:
            break
    return shrunk


@dataclass(frozen=True, kw_only=True)
class Nothing(Mechanism):
    """The values themselves: what a model takes without its attention."""

    type: ClassVar[str] = "nothing"

    @property
    def approximates(self) -> bool:
        return True

    @property
    def grouped_heads(self) -> bool:
        return True

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
        return v if v.shape[1] == q.shape[1] else v.repeat_interleave(q.shape[1] // v.shape[1], dim=1)

    def flops(self, grid: TokenGrid, heads: int, head_dim: int, *, context: Context = Context()) -> int:
        return 0


def rates_of(card: str | None, model: nn.Module, text: int, like: Tensor) -> Rates:
    """By a GPU's name, or of this machine. Raises `ValueError` for a GPU without a data sheet here."""
    if card is None:
        return Measured(model, text, like)
    known = {name.lower(): own for name, own in CARDS.items()}
    if card.lower() not in known:
        raise ValueError(f"expected card= of {', '.join(CARDS)}, or None for this machine; got {card!r}")
    return DataSheet(known[card.lower()])
