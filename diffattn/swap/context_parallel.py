"""Swapped attention under diffusers' context parallelism (Ulysses): every rank sees all tokens, with some of the heads.

diffusers splits each stream of a model (text, image) evenly along its tokens, so at the exit of a layer

    rank r holds (b, h, n_r, d), its tokens:      text_r, picture_r
    an all-to-all gives it (b, h_r, n, d):        text_0, text_1, ..., picture_0, picture_1, ...
    and after the mechanism another one gives     (b, h, n_r, d) back

diffusers' own exchange leaves the order text_0, picture_0, text_1, picture_1, ..., which softmax does not mind; a grid
does. Heads are split evenly, or with `ulysses_anything` as evenly as they go, and then nothing is padded. Gradients
pass through; those of parameters are a part on each rank, to be added up. Communication is that of diffusers: queries,
keys, values and output once each, b n h d / ranks numbers per rank.

Refused: ring, where keys come in parts; plans other than the model's own (`_cp_plan`), whose order of the tokens is
unknown; mechanisms with weights of their own for each head, or that read the block's input, which is a part of the
tokens. A mechanism has to compute its heads apart, and to count them from `Context.first_head` where it tells them
from each other, or it gives another result than on one rank.

Source of the method: Jacobs et al., DeepSpeed Ulysses, https://arxiv.org/abs/2309.14509.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..families import Layout
from ..mechanisms.base import Mechanism

JOINT_STREAM = "encoder_hidden_states"
"""The argument that a plan splits beside the picture's tokens where text is a stream of its own."""


class Reading(Protocol):
    """What tells where a forward's tokens lie: `diffattn.swap.calls.frames.Reading`."""

    @property
    def layouts(self) -> Sequence[Layout]:
        """One for the whole batch, or one per sample."""
        ...

    def splits_text(self) -> bool:
        """`splits_text` of the model."""
        ...


def split_evenly(count: int, parts: int) -> tuple[int, ...]:
    """`count` in `parts` that differ by one at most, the larger ones first; as `torch.tensor_split`."""
    return tuple(count // parts + (part < count % parts) for part in range(parts))


@dataclass(frozen=True)
class Shards:
    """How the tokens and heads of one call lie on the ranks of `group`, of which this one is `rank`."""

    group: Any
    rank: int
    tokens: tuple[tuple[int, ...], ...]
    """Tokens of each stream on each rank: `tokens[rank][stream]`."""
    heads: tuple[int, ...]
    """Heads that each rank computes."""

    @property
    def first_head(self) -> int:
        """Number of this rank's first head."""
        return sum(self.heads[: self.rank])

    def gather(self, x: Tensor) -> Tensor:
        """`(b, heads, own tokens, d)` -> `(b, own heads, tokens, d)`, stream after stream."""
        shapes = [(len(x), self.heads[self.rank], sum(tokens), x.shape[3]) for tokens in self.tokens]
        received = self._exchange(x.split(self.heads, dim=1), shapes)
        table = [part.split(tokens, dim=2) for part, tokens in zip(received, self.tokens, strict=True)]
        return torch.cat([part for stream in zip(*table, strict=True) for part in stream], dim=2)

    def scatter(self, x: Tensor) -> Tensor:
        """Undo `gather`."""
        streams = [sum(stream) for stream in zip(*self.tokens, strict=True)]
        table = [
            part.split([tokens[stream] for tokens in self.tokens], dim=2)
            for stream, part in enumerate(x.split(streams, dim=2))
        ]
        parts = [torch.cat(rank, dim=2) for rank in zip(*table, strict=True)]
        shapes = [(len(x), heads, sum(self.tokens[self.rank]), x.shape[3]) for heads in self.heads]
        return torch.cat(self._exchange(parts, shapes), dim=1)

    def gather_mask(self, mask: Tensor | None) -> Tensor | None:
        """A mask over this rank's keys, `(b, 1, 1, own tokens)`, for all of them."""
        own = sum(self.tokens[self.rank])
        if mask is None:
            return None
        if mask.shape[1:] != (1, 1, own):
            raise NotImplementedError(
                f"under context parallelism a mask must be one over this rank's keys, (b, 1, 1, {own}), got "
                f"{tuple(mask.shape)}; leave layers with such a mask out with layers="
            )
        # gathered as if every rank had one head of it; not every backend sends booleans
        heads = mask.transpose(2, 3).expand(-1, len(self.heads), -1, -1)
        single = replace(self, heads=(1,) * len(self.heads))
        sent = heads.to(torch.uint8) if mask.dtype == torch.bool else heads
        return single.gather(sent).to(mask.dtype).transpose(2, 3)

    def _exchange(self, parts: Sequence[Tensor], shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
        """Send `parts[r]` to rank r, and receive from it a tensor of `shapes[r]`."""
        from torch.distributed import _functional_collectives as functional

        sizes = [torch.Size(shape).numel() for shape in shapes]
        sent = torch.cat([part.flatten() for part in parts])
        received = functional.all_to_all_single_autograd(sent, sizes, [part.numel() for part in parts], self.group)
        received = functional.wait_tensor(received)
        return [part.view(shape) for part, shape in zip(received.split(sizes), shapes, strict=True)]


def shards(parallel_config: Any, query: Tensor, reading_of: Callable[[int], Reading]) -> Shards:
    """How the `(b, heads, own tokens, d)` call lies on the ranks; raises for what can't be undone.

    `reading_of` gives the forward that a call with so many tokens belongs to.
    """
    config = _ulysses(parallel_config)
    group, ranks = config._ulysses_mesh.get_group(), config.ulysses_degree
    heads = _heads_of_ranks(query.shape[1], ranks, config.ulysses_anything)
    counts = _tokens_of_ranks(query, ranks, group, config.ulysses_anything)
    reading = reading_of(sum(counts))
    streams = streams_of(reading.layouts, sum(counts), reading.splits_text())
    tokens = tuple(zip(*(split_evenly(stream, ranks) for stream in streams), strict=True))
    if [sum(own) for own in tokens] != counts:
        raise ValueError(
            f"streams of {', '.join(map(str, streams))} tokens, split evenly, would lie on {ranks} ranks as "
            f"{[sum(own) for own in tokens]}, but the ranks have {counts}; call diffattn.restore first"
        )
    return Shards(group, config._ulysses_local_rank, tokens, heads)


def count_tokens(parallel_config: Any, query: Tensor) -> int:
    """The tokens of a `(b, heads, own tokens, d)` call on all ranks together, the same number on each of them."""
    config = getattr(parallel_config, "context_parallel_config", None)
    if config is None:
        return query.shape[2]
    ranks, uneven = config.ring_degree * config.ulysses_degree, config.ulysses_anything or config.ring_anything
    return sum(_tokens_of_ranks(query, ranks, config._flattened_mesh.get_group(), uneven))


def check_mechanism(mechanism: Mechanism, weights: nn.Module | None, query: Tensor, own_heads: int) -> None:
    """Raise for mechanisms that can't compute some of the heads by themselves."""
    if mechanism.needs & {"features", "hidden"}:
        what = "sees the layer's" if "hidden" in mechanism.needs else "compares the block's"
        raise NotImplementedError(
            f"{mechanism} {what} input, of which each rank has a part only under context parallelism; "
            f"use a mechanism that does not, or call diffattn.restore first"
        )
    if weights is None:
        return
    with torch.device("meta"):  # leaves the random numbers alone
        own = mechanism.weights(own_heads, query.shape[3])
    assert own is not None
    shapes = {name: tensor.shape for name, tensor in own.state_dict().items()}
    differing = [name for name, tensor in weights.state_dict().items() if tensor.shape != shapes.get(name)]
    if own_heads != query.shape[1] and differing:
        raise NotImplementedError(
            f"{mechanism} has weights for each head ({differing[0]}), and under context parallelism a rank computes "
            f"{own_heads} of {query.shape[1]} heads; use a mechanism without such weights, or call diffattn.restore "
            f"first"
        )


def streams_of(layouts: Sequence[Layout], tokens: int, joint: bool) -> tuple[int, ...]:
    """Sizes of the streams that `tokens` tokens are joined from: text apart where it is split as a stream (`joint`)."""
    if not joint:
        return (tokens,)
    found = set()
    for layout in layouts:
        grid = layout.grid(tokens)
        first = grid.before if layout.before is None else grid.before + grid.cells
        found.add((first, tokens - first))
    if len(found) > 1:
        raise NotImplementedError(
            "the samples of this batch have texts of several lengths, and context parallelism needs one; run them "
            "one by one"
        )
    return found.pop()


def splits_text(model: nn.Module) -> bool:
    """Is text a stream of its own in the plan by which `model` is split? Raises unless the plan is the model's."""
    installed = installed_plan(model)
    own = {name: entry for name, entry in (getattr(model, "_cp_plan", None) or {}).items() if isinstance(entry, dict)}
    if not own or installed != own:
        raise NotImplementedError(
            f"swapped attention has to know in which order the ranks hold the tokens, and knows it only where the "
            f"model is split by its own plan; {type(model).__name__} splits {_arguments_of(installed)} and by its own "
            f"plan {_arguments_of(own)}; call enable_parallelism without cp_plan=, or diffattn.restore first"
        )
    return any(JOINT_STREAM in entry for entry in own.values())


def is_parallel(model: nn.Module) -> bool:
    """Has `enable_parallelism` set up context parallelism?"""
    return getattr(getattr(model, "_parallel_config", None), "context_parallel_config", None) is not None


def installed_plan(model: nn.Module) -> dict[str, Any]:
    """The inputs that context parallelism splits, as the hooks in `model` have them: module -> argument -> how."""
    from diffusers.hooks.context_parallel import ContextParallelSplitHook

    plan = {}
    for module in model.modules():
        registry = getattr(module, "_diffusers_hook", None)
        for name, hook in registry.hooks.items() if registry is not None else ():
            if isinstance(hook, ContextParallelSplitHook):
                plan[name.partition("---")[2]] = hook.metadata
    return plan


def _arguments_of(plan: dict[str, Any]) -> str:
    return ", ".join(f"{module}.{name}".lstrip(".") for module, entry in plan.items() for name in entry) or "nothing"


def _ulysses(parallel_config: Any) -> Any:
    config = getattr(parallel_config, "context_parallel_config", None)
    if config is None:
        raise NotImplementedError(
            f"swapped attention runs under diffusers' context parallelism, ParallelConfig(context_parallel_config="
            f"ContextParallelConfig(ulysses_degree=...)), got {parallel_config!r}; call diffattn.restore first"
        )
    if config.ring_degree > 1:
        raise NotImplementedError(
            f"swapped attention runs under Ulysses' context parallelism alone, got ring_degree={config.ring_degree}, "
            f"ulysses_degree={config.ulysses_degree}: in a ring the keys come in parts, and no rank has all of them; "
            f"use ContextParallelConfig(ulysses_degree={config.ring_degree * config.ulysses_degree}), or call "
            f"diffattn.restore first"
        )
    return config


def _heads_of_ranks(heads: int, ranks: int, anything: bool) -> tuple[int, ...]:
    if heads % ranks and not anything:
        raise ValueError(
            f"Ulysses gives each of {ranks} ranks as many heads, but the layer has {heads}; use an ulysses_degree that "
            f"divides them, or ulysses_anything=True"
        )
    if heads < ranks:
        raise ValueError(
            f"Ulysses gives each of {ranks} ranks at least one head, but the layer has {heads}; use a smaller "
            f"ulysses_degree"
        )
    return split_evenly(heads, ranks)


def _tokens_of_ranks(query: Tensor, ranks: int, group: Any, uneven: bool) -> list[int]:
    """Tokens on each rank; asked of the others where they may differ."""
    if not uneven:
        return [query.shape[2]] * ranks
    counts = torch.empty(ranks, dtype=torch.int64, device=query.device)
    dist.all_gather_into_tensor(counts, counts.new_tensor([query.shape[2]]), group=group)
    return counts.tolist()
