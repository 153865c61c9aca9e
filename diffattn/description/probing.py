"""Which tokens of a call are which cells, measured.

The model runs with attention that gives every token its own value, so that no token hears of another, and the numbers
of some cells are changed: the queries and keys that change are theirs. One forward for each binary digit of the cells'
numbers tells all cells apart, whatever their order and whatever lies beside them. In UNets, whose convolutions mix the
features, it is done within each module that a layer lies in.
"""

import contextlib
import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .grids import Size, Source, View
from .watching import Call, Forward, Watch, copied

_CHANGED = 1e-3
"""Share of the largest change in a call from which a token counts as changed."""
_NUMBERS = 8
"""By which a token is known."""


@dataclass(frozen=True)
class Place:
    """Where the cells lie among the tokens of a call, row by row."""

    size: Size
    before: int
    after: int


@dataclass(frozen=True)
class Finding:
    """What the changes say of one call."""

    place: Place | None
    reason: str = ""
    """Why there is no place."""
    in_queries: bool = False
    """Do any queries depend on the cells?"""
    in_keys: bool = False
    same: bool = False
    """Are the keys the same cells as the queries?"""

    @property
    def worth(self) -> int:
        """How much it says."""
        return 2 if self.place is not None else int(self.in_queries or self.in_keys)


class _Passing(Watch):
    """Attention gives every token its own value; what the tokens are is noted."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.marks: list[tuple[Tensor, Tensor]] = []

    def answer(self, call: Call, given: dict[str, Any], compute: Callable[..., Tensor]) -> Tensor:
        query, key, value = given["query"], given["key"], given["value"]
        self.marks.append((_mark(query), _mark(key)))
        if query.shape[-2] != value.shape[-2]:
            return query.new_zeros((*query.shape[:-1], value.shape[-1]))
        if query.ndim == 4 and query.shape[1] != value.shape[1]:
            value = value.repeat_interleave(query.shape[1] // value.shape[1], dim=1)
        return value.clone()


def _mark(x: Tensor) -> Tensor:
    """A few numbers for each token (b, n, r), each of all heads."""
    x = x if x.ndim == 4 else x[:, None]
    weights = torch.randn(x.shape[1], x.shape[3], _NUMBERS, generator=torch.Generator().manual_seed(2)).to(x.device)
    return torch.einsum("bhnd,hdr->bnr", x.float(), weights).nan_to_num()


def probe(forward: Forward, source: Source, view: View) -> dict[str, list[Finding]]:
    """Layer -> what each of its calls has of the source's cells; empty where the calls change in number."""
    size = view.size(source.size)
    count, value = math.prod(size), forward.inputs[source.argument]

    def run(bit: int | None) -> _Passing:
        chosen = None if bit is None else (torch.arange(1, count + 1).view(size) >> bit & 1).bool()
        changes = {} if chosen is None else {source.argument: source.disturbed(value, chosen.expand(source.size))}
        with _Passing(forward.model) as watch:
            forward(**changes)
        return watch

    def hopeful(call: Call, queries: Tensor) -> bool:
        return view.fits(source, call.query) and int(queries[0].count_nonzero()) == (count + 1) // 2

    found: dict[str, list[Finding]] = defaultdict(list)
    for call, (queries, keys) in _codes(run, count.bit_length(), hopeful):
        found[call.layer].append(_finding(queries, keys, size, source.told))
    return dict(found)


def probe_levels(forward: Forward, owners: Mapping[str, str], levels: Mapping[str, Size]) -> dict[str, list[Finding]]:
    """As `probe`, for layers whose grid is that of the features that the module around them, their owner, is given.

    Cells change places with each other, which no norm over them notices, and the owner gives what it gave before, so
    that every owner begins with the same features.
    """
    sizes = {owner: levels[owner] for owner in owners.values()}
    kept: dict[str, list[Any]] = {}

    def run(bit: int | None) -> _Passing:
        with _Passing(forward.model) as watch, contextlib.ExitStack() as stack:
            for owner, size in sizes.items():
                module = forward.model.get_submodule(owner)
                stack.enter_context(_removed(module.register_forward_pre_hook(_exchange(size, bit), with_kwargs=True)))
                outputs = kept.setdefault(owner, [])
                stack.enter_context(_removed(module.register_forward_hook(_repeat(outputs, bit is None))))
            forward()
        return watch

    bits = max((int(_numbers(size)[-1]).bit_length() for size in sizes.values()), default=0)
    found: dict[str, list[Finding]] = defaultdict(list)
    for call, (queries, keys) in _codes(run, bits):
        if call.layer in owners:
            size = sizes[owners[call.layer]]
            told = "the features around the layer"
            found[call.layer].append(_finding(queries, keys, size, told, int(_numbers(size)[0])))
    return dict(found)


def _numbers(size: Size) -> Tensor:
    """Numbers of the cells, each digit of which is one in two cells at least."""
    count = math.prod(size)
    return torch.arange(count) + (2 if count & (count - 1) == 0 else 1)


def _exchange(size: Size, bit: int | None) -> Callable[..., Any]:
    """A hook by which the chosen cells of a feature map change places."""

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        features = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        if bit is None:
            return None
        cells = features.flatten(2).clone()
        chosen = torch.nonzero(_numbers(size) >> bit & 1).flatten()
        cells[..., chosen] = cells[..., chosen.roll(1)]
        changed = cells.view(features.shape)
        if "hidden_states" in kwargs:
            return args, {**kwargs, "hidden_states": changed}
        return (changed, *args[1:]), kwargs

    return enter


def _repeat(outputs: list[Any], keep: bool) -> Callable[..., Any]:
    """A hook by which a module gives what it gave in the first run."""
    turns = itertools.count()

    def leave(module: nn.Module, args: Any, output: Any) -> Any:
        if keep:
            outputs.append(copied(output))
            return None
        return copied(outputs[next(turns)])  # what follows may write into it

    return leave


@contextlib.contextmanager
def _removed(hook: Any) -> Iterator[None]:
    try:
        yield
    finally:
        hook.remove()


def _codes(
    run: Callable[[int | None], _Passing], bits: int, hopeful: Callable[[Call, Tensor], bool] = lambda *_: True
) -> list[tuple[Call, tuple[Tensor, Tensor]]]:
    """Each call with the numbers of its queries and keys (b, n), 0 for those that never change.

    Where no call is `hopeful` after the first digit, the others are not asked for.
    """
    first = run(None)
    codes = [tuple(torch.zeros(mark.shape[:2], dtype=torch.long) for mark in marks) for marks in first.marks]
    for bit in range(bits):
        other = run(bit)
        if [call.layer for call in other.calls] != [call.layer for call in first.calls]:
            return []
        for code, before, after in zip(codes, first.marks, other.marks, strict=True):
            for part, one, two in zip(code, before, after, strict=True):
                part += _changed(one, two).long().cpu() << bit
        if not bit and not any(hopeful(call, code[0]) for call, code in zip(first.calls, codes, strict=True)):
            break
    return [(call, (queries, keys)) for call, (queries, keys) in zip(first.calls, codes, strict=True)]


def _changed(one: Tensor, two: Tensor) -> Tensor:
    """Which tokens (b, n) differ, beyond rounding."""
    if one.shape != two.shape:
        return torch.ones(one.shape[:2], dtype=torch.bool)
    change = (one - two).abs().amax(dim=-1)
    if change.max() <= 1e-6 * one.abs().max():
        return torch.zeros_like(change, dtype=torch.bool)
    return change > _CHANGED * change.max()


def _finding(queries: Tensor, keys: Tensor, size: Size, told: str, first: int = 1) -> Finding:
    place = _place(queries, size, first)
    same = queries.shape == keys.shape and bool((queries == keys).all())
    in_queries, in_keys = bool(queries.any()), bool(keys.any())
    if isinstance(place, str):
        return Finding(None, f"{place} ({told})", in_queries, in_keys, same)
    return Finding(place, "", in_queries, in_keys, same)


def _place(code: Tensor, size: Size, number: int) -> Place | str:
    """Where the cells, numbered from `number` on, lie by the codes (b, n) of the tokens; or what is wrong with them."""
    count, tokens = math.prod(size), torch.nonzero(code[0]).flatten()
    if (code != code[:1]).any():
        return "samples differ in where their cells lie: a reader gives each its layout, as that of Lumina2 does"
    if len(tokens) != count:
        return f"{len(tokens)} of {code.shape[1]} tokens depend on {count} cells, not one on each"
    first, last = int(tokens[0]), int(tokens[-1])
    if last - first + 1 != count:
        return "other tokens lie between the cells"
    if (code[0, first : last + 1] != torch.arange(number, number + count)).any():
        return "the cells are in another order than frame by frame and row by row, or mixed"
    return Place(size, first, code.shape[1] - 1 - last)
