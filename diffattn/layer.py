"""What one swapped layer knows when its attention is computed: mechanism, weights, grid, step."""

import contextlib
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from . import context_parallel
from .families import Layout, Read, arguments
from .grid import TokenGrid
from .mechanisms.base import Context, Mechanism
from .steps import StepCounter

_NO_BACKWARD = -1


class GridReader:
    """A forward pre-hook that reads the layout of every forward of one module and hands it to the layers inside.

    Gradient checkpointing computes blocks again in the backward pass, when another forward may have come between. A
    recomputed layer therefore takes the layout that its number of tokens had in the forward pass, and refuses where
    two grids of equal size are under way at once. Where the module itself is computed again, it is read again.
    """

    def __init__(self, read: Read) -> None:
        self._read = read
        self.layouts: tuple[Layout, ...] | None = None
        self._module: nn.Module | None = None
        self._splits_text: bool | None = None
        self._forwards: dict[int, _Forward] = {}
        self._recording = False
        self._backward = _NO_BACKWARD
        """The backward pass in which the layout was read last."""

    @torch.compiler.disable
    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.layouts = self._read(module, arguments(module, args, kwargs))
        self._module, self._splits_text = module, None
        if context_parallel.is_parallel(module):
            with contextlib.suppress(NotImplementedError):  # for the layers to raise, if they are wanted
                self.splits_text()
        self._recording = torch.is_grad_enabled()
        self._backward = torch._C._current_graph_task_id()

    def grids(self, tokens: int) -> tuple[TokenGrid, ...]:
        """One grid for the whole batch, or one per sample where they differ."""
        first, *others = (layout.grid(tokens) for layout in self.layouts_of(tokens))
        return (first, *others) if any(grid != first for grid in others) else (first,)

    def layouts_of(self, tokens: int) -> tuple[Layout, ...]:
        """The layouts of the forward that a call with this many tokens belongs to."""
        layouts = self.layouts if torch.compiler.is_compiling() else self._recall(tokens)
        if layouts is None:
            raise RuntimeError(
                "a swapped layer was called outside its model, so its token grid is unknown; restore first"
            )
        return layouts

    def splits_text(self) -> bool:
        """Does context parallelism split text as a stream of its own? Looked up once a forward, if possible eagerly."""
        if self._splits_text is None:
            assert self._module is not None
            self._splits_text = context_parallel.splits_text(self._module)
        return self._splits_text

    def _recall(self, tokens: int) -> tuple[Layout, ...] | None:
        last = self._forwards.get(tokens)
        backward = torch._C._current_graph_task_id()
        if backward == _NO_BACKWARD:
            if self._recording:
                pending = None if last is None or last.recomputed else last
                ambiguous = pending is not None and (pending.ambiguous or pending.layouts != self.layouts)
                self._forwards[tokens] = _Forward(self.layouts, ambiguous)
            return self.layouts
        if last is None or backward == self._backward:
            return self.layouts
        if last.ambiguous:
            del self._forwards[tokens]
            raise RuntimeError(
                f"two grids of {tokens} tokens went forward before this backward pass, and gradient checkpointing "
                f"cannot tell them apart; run backward after each forward"
            )
        last.recomputed = True
        return last.layouts


@dataclass
class _Forward:
    layouts: tuple[Layout, ...] | None
    ambiguous: bool
    recomputed: bool = False


class LatentReader:
    """A forward pre-hook on a UNet that notes the size of its latent picture."""

    def __init__(self, argument: str) -> None:
        self._argument = argument
        self.pixels = 0

    @torch.compiler.disable
    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        height, width = arguments(module, args, kwargs)[self._argument].shape[-2:]
        self.pixels = int(height * width)

    def downsample(self, grid: TokenGrid) -> int:
        """How many times coarser `grid` is along a side, rounded up."""
        ratio = self.pixels // (grid.height * grid.width)
        return max(1, int(-(-(ratio**0.5) // 1)))


class Features:
    """A forward pre-hook on a block that keeps its input until the layer has used it; dense steps need none."""

    def __init__(self, layer: "SwappedLayer") -> None:
        self._layer = layer

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        block_input = args[0] if args else kwargs["hidden_states"]
        state = self._layer.state
        self._layer.features = None if state.dense or state.paused else block_input


@dataclass(eq=False)
class SwappedLayer:
    """One attention module whose exit is ours."""

    name: str
    module: nn.Module
    kind: str
    mechanism: Mechanism
    backend: str
    reader: GridReader
    state: "State"
    index: int
    original: Any
    min_tokens: int = 0
    latent: LatentReader | None = None
    weights: nn.Module | None = None
    processor: Any = None
    features: Tensor | None = field(default=None, repr=False)
    reached: bool = False
    """Has the model's forward come to this layer's exit?"""
    grid: TokenGrid | None = None
    """Grid of the last call."""
    shapes: tuple[Tensor, Tensor | None] | None = field(default=None, repr=False)
    """Query and mask of the last call, without their data."""

    def wants(self, query: Tensor, key: Tensor, parallel_config: Any = None) -> bool:
        """False for exact mechanisms, outside the chosen steps and below `min_tokens`: the model's own attention.

        So it is where the keys are not the queries' own tokens, as those of picture prompts (IP-Adapter) are not.
        """
        if query.shape[2] != key.shape[2]:
            return False
        self.reached = True
        if self.mechanism.exact or self.state.dense or self.state.paused or values_replace_attention():
            return False
        if parallel_config is None or not self.min_tokens:
            return query.shape[2] >= self.min_tokens
        return context_parallel.count_tokens(parallel_config, query) >= self.min_tokens

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        scale: float | None,
        parallel_config: Any = None,
    ) -> Tensor:
        """The mechanism on (b, h, n, d), where the tokens may be those of one rank among several."""
        if parallel_config is None:
            return self._attend_all(query, key, value, as_four_axes(mask), scale)
        shards = context_parallel.shards(parallel_config, query, self.reader)
        context_parallel.check_mechanism(self.mechanism, self.weights, query, shards.heads[shards.rank])
        mask = shards.gather_mask(as_four_axes(mask))
        q, k, v = (shards.gather(tensor) for tensor in (query, key, value))
        return shards.scatter(self._attend_all(q, k, v, mask, scale))

    def _attend_all(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None
    ) -> Tensor:
        """The mechanism on all tokens; sample by sample where their grids differ."""
        grids = self.reader.grids(query.shape[2])
        features = self._take_features(len(query))
        self.grid = grids[0]
        if not torch.compiler.is_compiling():
            self.shapes = without_data(query), None if mask is None else without_data(mask)
        if len(grids) == 1:
            return self._attend(query, key, value, grids[0], mask, features, scale)
        samples = []
        for i, grid in enumerate(grids):
            one = slice(i, i + 1)
            own_mask = mask if mask is None or mask.shape[0] == 1 else mask[one]
            own_features = None if features is None else features[one]
            samples.append(self._attend(query[one], key[one], value[one], grid, own_mask, own_features, scale))
        return torch.cat(samples)

    def _take_features(self, samples: int) -> Tensor | None:
        """The block's input for the next samples of the batch; some families (Mochi) call sample by sample."""
        if self.features is None:
            return None
        features, rest = self.features[:samples], self.features[samples:]
        self.features = rest if len(rest) else None
        return features

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        grid: TokenGrid,
        mask: Tensor | None,
        features: Tensor | None,
        scale: float | None,
    ) -> Tensor:
        context = self._context(grid, mask, features)
        return self.mechanism.attend(query, key, value, grid, scale=scale, backend=self.backend, context=context)

    def _context(self, grid: TokenGrid, mask: Tensor | None, features: Tensor | None) -> Context:
        needs = self.mechanism.needs
        return Context(
            mask=mask,
            weights=self.weights,
            features=features,
            progress=self.state.progress,
            timestep=self.state.timestep,
            sigma=self.state.sigma,
            downsample=self.latent.downsample(grid) if self.latent and "downsample" in needs else 1,
            call_index=self.index if "call_index" in needs else 0,
        )

    def flops(self, mechanism: Mechanism) -> int:
        """What `mechanism` would compute in the last call, for one sample."""
        assert self.grid is not None and self.shapes is not None
        query, mask = self.shapes
        context = self._context(self.grid, mask, None)
        return mechanism.flops(self.grid, query.shape[1], query.shape[3], context=context)

    def explain_backend(self) -> str:
        """The kernel of the last call, and why "auto" chose it."""
        if self.grid is None or self.shapes is None:
            return self.backend
        query, mask = self.shapes
        context = self._context(self.grid, mask, None)
        return self.mechanism.explain_backend(query, query, query, self.grid, self.backend, context)


def values_replace_attention() -> bool:
    """Is this the perturbed forward of PAG? There diffusers answers every call of softmax attention with its values.

    A mechanism that makes no such call, or calls of other sizes, would attend as ever, and guidance would do nothing.
    """
    modes = torch.overrides._get_current_function_mode_stack()
    return any(type(mode).__name__ == "AttentionScoreSkipFunctionMode" for mode in modes)


def without_data(tensor: Tensor) -> Tensor:
    """A tensor of the same shape, dtype and device that holds a single number."""
    return tensor.new_empty(()).expand(tensor.shape)


def as_four_axes(mask: Tensor | None) -> Tensor | None:
    """A mask over keys (b, m), or over queries and keys (b, n, m), as (b, 1, 1 or n, m)."""
    if mask is None or mask.ndim == 4:
        return mask
    return mask[:, None, None] if mask.ndim == 2 else mask[:, None]


@dataclass(eq=False)
class State:
    """What all swapped layers of one model share during a forward."""

    steps: StepCounter | None = None
    chosen: Any = None
    """Predicate on the step, given by `steps=`; None: every step."""
    needs: frozenset[str] = frozenset()
    """`Mechanism.needs`: what is not needed is not filled in."""
    dense: bool = False
    paused: bool = False
    """The model's own attention for now, whatever the step."""
    progress: float | None = None
    timestep: float | None = None
    sigma: float | None = None

    @property
    def counts_steps(self) -> bool:
        """Does anything depend on the step of the pipeline?"""
        return self.steps is not None and (self.chosen is not None or bool(self.needs & {"progress", "sigma"}))

    @property
    def reads_timestep(self) -> bool:
        """Does anything depend on the timestep of a model call? Reading it waits for the device."""
        return self.counts_steps or "timestep" in self.needs

    def update(self, timestep: Tensor | float) -> None:
        """Take the timestep of one model call; of several the largest counts."""
        if not self.reads_timestep:
            return
        value = float(timestep.max()) if isinstance(timestep, Tensor) else float(timestep)
        self.timestep = value if "timestep" in self.needs else None
        if not self.counts_steps:
            return
        assert self.steps is not None
        self.steps.update(value)
        self.dense = self.chosen is not None and not self.chosen(self.steps.step, self.steps.total)
        self.progress = self.steps.progress if "progress" in self.needs else None
        self.sigma = self.steps.sigma if "sigma" in self.needs else None
