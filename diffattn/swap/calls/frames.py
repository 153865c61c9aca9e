"""Which forward is running, and what its layers know of it.

A swapped layer is told neither its grid nor the step by the model. Forward hooks on the model, and on the modules
inside it that know a level's size, push a `Frame` when their forward begins and take it away when it ends, also by an
exception. The stack is a context variable: every thread and every asyncio task has its own, so two threads may run one
model on two shapes. A layer takes the innermost frame that has its scope; where there is none it was called outside
its model, and an older grid is never used.

Gradient checkpointing computes blocks again in the backward pass, when their forward is over. diffusers' own
checkpointing is given functions that bring the frames back (`KeepsFrames`). Other wrappers are served from memory by
the number of tokens, and refused where two forwards of equal size are under way at once (`Recall`).
"""

import copy
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from diffattn.families import Layout, Read, arguments, flux2_ids, flux_ids
from diffattn.grid import TokenGrid

from .. import context_parallel
from .steps import Moment, Run

T = TypeVar("T")

NO_BACKWARD = -1


class Ref(Generic[T]):
    """A weak reference that follows a deep copy: in the copy it leads to the copied object."""

    def __init__(self, target: T) -> None:
        self._target = weakref.ref(target)

    def __call__(self) -> T | None:
        return self._target()

    def __deepcopy__(self, memo: dict[int, Any]) -> "Ref[T]":
        target = self._target()
        return copy.copy(self) if target is None else Ref(memo.get(id(target), target))


class Scope:
    """Layers that are told their grid together, by the forward of one module; identity is what counts."""


class Reading:
    """The layouts of one forward, read when a layer first asks: mechanisms without geometry never do."""

    def __init__(self, read: Read, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._module = weakref.ref(module)
        self._unread: tuple[Read, tuple[Any, ...], dict[str, Any]] | None = (read, args, kwargs)
        self._layouts: tuple[Layout, ...] = ()

    @property
    def layouts(self) -> tuple[Layout, ...]:
        """One for the whole batch, or one per sample."""
        if self._unread is not None:
            read, args, kwargs = self._unread
            module = self._module()
            assert module is not None
            self._layouts = read(module, arguments(module, args, kwargs))
            self._unread = None
        return self._layouts

    def grids(self, tokens: int, queries: int) -> tuple[TokenGrid, ...]:
        """One grid for the whole batch, or one per sample where they differ."""
        first, *others = (layout.grid(tokens, queries) for layout in self.layouts)
        return (first, *others) if any(grid != first for grid in others) else (first,)

    def also(self, grid: TokenGrid) -> tuple[TokenGrid, ...]:
        """Further grids of sequences whose first is `grid`."""
        first, *others = self.layouts
        if any(layout.also != first.also for layout in others):
            raise NotImplementedError(
                "the samples of a call hold several images each, of other sizes: not supported; call the model sample "
                "by sample, or call diffattn.restore first"
            )
        return first.further(grid)

    @property
    def ids(self) -> Tensor | None:
        """The position ids that the layouts would be read from; None where something else tells them."""
        module = self._module()
        if self._unread is None or self._unread[0] not in (flux_ids, flux2_ids) or module is None:
            return None
        call = arguments(module, *self._unread[1:])
        ids: Tensor = call["img_ids"]
        return ids if call.get("kv_cache_mode") is None else None

    def splits_text(self) -> bool:
        """Does context parallelism split text as a stream of its own?"""
        module = self._module()
        assert module is not None
        return context_parallel.splits_text(module)


Given = tuple[Tensor, int] | None
"""A block's input and how many of its samples were taken; None outside of the block."""


def next_samples(given: Given, samples: int) -> tuple[Tensor | None, Given]:
    """The next samples of a block's input and what is left, which begins again after the last.

    Some families (Mochi) call sample by sample, others (Stable Audio 3) several times with the whole batch.
    """
    if given is None:
        return None, None
    features, taken = given
    return features[taken : taken + samples], (features, (taken + samples) % features.shape[0])


@dataclass(eq=False)
class Call:
    """One forward of a model with swapped layers; outside a pipeline it has neither run nor moment."""

    run: Run | None = None
    moment: Moment | None = None
    dense: bool = False
    """Does `steps=` leave this step to the model's own attention?"""
    timestep: float | None = None
    pixels: int = 0
    """Cells of the latent image, where levels differ."""
    sample: Any = None
    """What tells this call from the others of the same step: its text, and its number among those with it."""
    ordered: Any = None
    """The order in which its tokens are, see `diffattn.swap.ordering`; None: row-major."""
    placed: bool = False
    """Are the positions in it already?"""
    features: dict[int, Given] = field(default_factory=dict)
    """Index of a layer -> its block's input, while the block runs."""
    turns: dict[int, int] = field(default_factory=dict)
    """Layer -> number of its last call in this forward: some families (Mochi) call sample by sample."""
    done: dict[Any, Any] = field(default_factory=dict)
    """What the layers did: see `diffattn.swap.calls.records`."""

    def take_features(self, layer: int, samples: int) -> Tensor | None:
        """The input of a layer's block for the next samples."""
        features, self.features[layer] = next_samples(self.features.get(layer), samples)
        return features


@dataclass(frozen=True, eq=False)
class Frame:
    """A module whose forward is under way."""

    door: Any
    call: Call
    readings: Mapping[Scope, Reading]


_frames: ContextVar[tuple[Frame, ...]] = ContextVar("diffattn frames", default=())


def push(frame: Frame) -> None:
    """A forward begins; what an interrupted forward of the same module left behind goes."""
    _frames.set((*_below(frame.door), frame))


def pop(door: Any) -> Frame | None:
    """The forward of `door`'s module ends."""
    frames, below = _frames.get(), _below(door)
    _frames.set(below)
    return frames[len(below)] if len(below) < len(frames) else None


def _below(door: Any) -> tuple[Frame, ...]:
    frames = _frames.get()
    return next((frames[:i] for i, frame in enumerate(frames) if frame.door is door), frames)


def find(scope: Scope) -> Frame | None:
    """The innermost frame that tells the grids of `scope`."""
    return next((frame for frame in reversed(_frames.get()) if scope in frame.readings), None)


def in_backward() -> bool:
    """Is a backward pass computing, so that a forward is one that checkpointing repeats?"""
    return torch._C._current_graph_task_id() != NO_BACKWARD


@contextmanager
def _brought_back(frames: tuple[Frame, ...]) -> Iterator[None]:
    token = _frames.set(frames)
    try:
        yield
    finally:
        _frames.reset(token)


class KeepsFrames:
    """A checkpointing function of diffusers that computes again in the frames of the forward."""

    def __init__(self, checkpoint: Callable[..., Any]) -> None:
        self.checkpoint = checkpoint

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        frames = _frames.get()

        def again(*args: Any, **kwargs: Any) -> Any:
            if not in_backward():
                return function(*args, **kwargs)
            with _brought_back(frames):
                return function(*args, **kwargs)

        return self.checkpoint(again if frames else function, *args, **kwargs)


@dataclass
class _Forward:
    frame: Frame
    ambiguous: bool
    recomputed: bool = False


class Recall:
    """The last forward for each number of tokens, for layers that some other checkpointing computes again."""

    def __init__(self) -> None:
        self._forwards: dict[tuple[Scope, int], _Forward] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> "Recall":
        return Recall()

    def note(self, scope: Scope, tokens: int, frame: Frame) -> None:
        """A call went forward with gradients."""
        last = self._forwards.get((scope, tokens))
        pending = None if last is None or last.recomputed else last
        ambiguous = pending is not None and (pending.ambiguous or not _alike(pending.frame, frame, scope))
        call = Call(timestep=frame.call.timestep, moment=frame.call.moment, dense=frame.call.dense)
        call.pixels = frame.call.pixels
        readings = {} if call.dense else {scope: frame.readings[scope]}  # nobody reads a grid in a dense step
        self._forwards[scope, tokens] = _Forward(Frame(frame.door, call, readings), ambiguous)

    def find(self, scope: Scope, tokens: int) -> Frame | None:
        """The frame of the forward that is computed again."""
        last = self._forwards.get((scope, tokens))
        if last is None:
            return None
        if last.ambiguous:
            del self._forwards[scope, tokens]
            raise RuntimeError(
                f"two forwards of {tokens} tokens, of other grids or steps, went before this backward pass, and this "
                f"gradient checkpointing cannot tell them apart; run backward after each forward, or use the model's "
                f"own enable_gradient_checkpointing"
            )
        last.recomputed = True
        return last.frame


def _alike(one: Frame, other: Frame, scope: Scope) -> bool:
    """Would a layer compute the same in both?"""
    calls = [(frame.call.dense, frame.call.moment, frame.call.timestep) for frame in (one, other)]
    if calls[0] != calls[1]:
        return False
    return one.call.dense or one.readings[scope].layouts == other.readings[scope].layouts
