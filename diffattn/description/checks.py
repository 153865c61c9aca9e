"""What the test suite asks of a row, as far as one model and one set of inputs can tell.

The windows that `clear` is compared with are masks over the calls of the untouched model, made from the measured places
of the cells: the row has no part in them.
"""

import contextlib
import logging
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .. import families
from ..families import Family
from ..swap import model_swap
from ..swap.apply import Handle, commit
from ..swap.plan import Mechanisms, plan_all, resolve
from ..swap.settings.placement import Placement
from .probing import Place
from .watching import Call, Forward, Watch

RADIUS = 2
_TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""Largest error of outputs, in units of their root mean square."""
_LEAST = 1e-3
"""What a window has to change."""

Places = dict[str, list[Place]]
"""Layer -> where its cells lie, call by call."""


@dataclass(frozen=True)
class Check:
    """One question to the row, and the answer."""

    passed: bool | None
    """None: these inputs cannot tell."""
    told: str

    def __str__(self) -> str:
        return f"{ {True: 'passed', False: 'FAILED', None: 'not run'}[self.passed]:<8} {self.told}"


class _Windows(Watch):
    """Lays windows over the calls of layers whose places are known."""

    def __init__(self, model: nn.Module, places: Places) -> None:
        super().__init__(model)
        self._places = places
        self._turns: dict[str, int] = defaultdict(int)

    def answer(self, call: Call, given: dict[str, Any], compute: Callable[..., Tensor]) -> Tensor:
        if call.layer in self._places:
            turn = self._turns[call.layer]
            self._turns[call.layer] += 1
            if turn < len(self._places[call.layer]):
                window = _window(self._places[call.layer][turn]).to(given["query"].device)
                given["attn_mask"] = _joined(window, given.get("attn_mask"))
        return compute(**given)


def _window(place: Place) -> Tensor:
    """Which tokens see which (n, n): cells those nearer than the radius, all others everything."""
    cells = torch.cartesian_prod(*(torch.arange(size) for size in place.size))
    tokens = place.before + len(cells) + place.after
    mask = torch.ones(tokens, tokens, dtype=torch.bool)
    inside = slice(place.before, place.before + len(cells))
    mask[inside, inside] = ((cells[:, None] - cells[None]) ** 2).sum(-1) < RADIUS**2
    return mask


def _joined(window: Tensor, own: Tensor | None) -> Tensor:
    if own is None:
        return window
    return own & window if own.dtype == torch.bool else own.masked_fill(~window, -torch.inf)


def checks_of(forward: Forward, family: Family, kinds: dict[str, str], places: Places, video: bool) -> list[Check]:
    """All that can be asked; `kinds` are those of the row's layers by name. `video`: latents have frames."""
    model = forward.model
    with _row_in_front(family), _quietly(model):
        own = forward()
        found = [*_inputs(places, video)]
        before = _state(model)
        steps: list[tuple[str, Callable[[], Check]]] = [("softmax", partial(_softmax, forward, own, kinds))]
        for kind in dict.fromkeys(kinds.values()):
            steps.append((f"clear on {kind} layers", partial(_clear, forward, own, kinds, places, kind)))
        for name, step in steps:
            try:
                found.append(step())
            except Exception as error:  # of whatever the row does wrong
                found.append(Check(False, f"{name}: {type(error).__name__}: {error}"))
                swap = model_swap.current(model)
                if swap is not None:
                    swap.undo()
        same = torch.equal(forward(), own) and _state(model) == before
        found.append(Check(same, "restore leaves processors and hooks as they were, and the output bit for bit"))
    return found


def _inputs(places: Places, video: bool) -> Iterator[Check]:
    sizes = {place.size for own in places.values() for place in own}
    across = [size for size in sizes if size[1:] != (1, 1)]
    if video and all(frames == 1 for frames, _, _ in sizes):
        yield Check(None, "frames are told from samples: give latents of several frames")
    if any(height == width for _, height, width in across):
        yield Check(None, "height and width are told apart: give inputs that are not square")
    elif across:
        yield Check(True, "the grid is not square: height and width are told apart")


def counted(number: int, name: str) -> str:
    """`1 layer`, `2 layers`"""
    return f"{number} {name}" + ("s" if number > 1 else "")


def batch_check(samples: int) -> Check:
    """Do the inputs hold several samples?"""
    if samples > 1:
        return Check(True, f"{samples} samples lie alike")
    return Check(None, "samples are told apart: give inputs with a batch of two")


def _softmax(forward: Forward, own: Tensor, kinds: dict[str, str]) -> Check:
    with _swapped(forward.model, "softmax", set(kinds)) as handle:
        got = forward()
        missed = [layer.name for layer in handle.layers if not layer.reached]
        left = sorted(kinds.keys() - {layer.name for layer in handle.layers})
    told = f"softmax on {counted(len(kinds), 'layer')} is the model bit for bit"
    if missed or left:
        return Check(False, f"{told}: {(missed + left)[0]} does not come to its exit")
    return Check(torch.equal(got, own), told)


def _clear(forward: Forward, own: Tensor, kinds: dict[str, str], places: Places, kind: str) -> Check:
    layers = {name for name in kinds if kinds[name] == kind}
    with _Windows(forward.model, {name: places[name] for name in layers}):
        want = forward()
    with _swapped(forward.model, "clear", layers, radius=RADIUS):
        got = forward()
    error, change = _error(got, want), _error(want, own)
    some = counted(len(layers), f"{kind} layer")
    told = f"clear(radius={RADIUS}) on {some} is the model under masks made from these places"
    if change < _LEAST:
        return Check(None, f"{told}: they change nothing; give a larger grid, and weights that are not zero")
    return Check(error < _TOLERANCE.get(own.dtype, 5e-2), f"{told}: error {error:.1e}, change {change:.1e}")


def _error(got: Tensor, want: Tensor) -> float:
    """Largest absolute difference, in units of the wanted output's root mean square."""
    return float((got - want).abs().max() / want.square().mean().sqrt())


@contextlib.contextmanager
def _swapped(model: nn.Module, name: str, layers: set[str], **options: Any) -> Iterator[Handle]:
    mechanism: Mechanisms = resolve(name, **options)
    placement = Placement(layers=lambda layer: layer in layers)
    with commit(plan_all(model, mechanism, placement), trained=True) as handle:
        yield handle


@contextlib.contextmanager
def _row_in_front(family: Family) -> Iterator[None]:
    """The row counts before all others, inside the block."""
    families.FAMILIES.insert(0, family)
    try:
        yield
    finally:
        for index, row in enumerate(families.FAMILIES):
            if row is family:
                del families.FAMILIES[index]
                break


@contextlib.contextmanager
def _quietly(model: nn.Module) -> Iterator[None]:
    """Nothing is logged of a trial, nor counts as told."""
    thread = threading.get_ident()
    logger, told = logging.getLogger("diffattn"), model_swap._too_small.get(model)
    known = None if told is None else set(told)

    def silent(record: logging.LogRecord) -> bool:
        return record.thread != thread

    logger.addFilter(silent)
    try:
        yield
    finally:
        logger.removeFilter(silent)
        model_swap._too_small.pop(model, None)
        if known is not None:
            model_swap._too_small[model] = known


def _state(model: nn.Module) -> list[Any]:
    """What a swap could leave behind."""
    return [
        (name, id(getattr(module, "processor", None)), sorted(vars(module)), _hooks(module))
        for name, module in model.named_modules()
    ]


def _hooks(module: nn.Module) -> list[int]:
    return [len(value) for key, value in sorted(vars(module).items()) if "hook" in key and hasattr(value, "__len__")]
