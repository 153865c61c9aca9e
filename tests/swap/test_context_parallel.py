"""Ulysses' exchange and the order of the tokens; real ranks run in `tests/composition/test_context_parallel.py`."""

import threading
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
from diffusers.hooks.context_parallel import apply_context_parallel
from models import flux, sd3
from torch import Tensor

import diffattn
from diffattn.families import Layout
from diffattn.swap.context_parallel import (
    Shards,
    check_mechanism,
    count_tokens,
    installed_plan,
    is_parallel,
    shards,
    split_evenly,
    splits_text,
    streams_of,
)


class Post:
    """Carries parts between threads that stand for ranks."""

    def __init__(self, ranks: int) -> None:
        self.barrier = threading.Barrier(ranks, timeout=30)
        self.parts: list[Any] = [None] * ranks


class Simulated(Shards):
    """Ranks in threads: the group is their post."""

    def _exchange(self, parts: Any, shapes: Any) -> list[Tensor]:
        self.group.parts[self.rank] = list(parts)
        self.group.barrier.wait()
        received = [sent[self.rank] for sent in self.group.parts]
        self.group.barrier.wait()
        assert [tuple(part.shape) for part in received] == [tuple(shape) for shape in shapes]
        return received


def on_all_ranks(ranks: int, work: Callable[[int, Post], Any]) -> list[Any]:
    post, results = Post(ranks), [None] * ranks

    def run(rank: int) -> None:
        results[rank] = work(rank, post)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


SHARDS = [
    (2, 2, (6, 54)),  # ranks, heads, streams
    (2, 4, (60,)),
    (4, 4, (0, 12)),
    (2, 3, (5, 9)),
    (3, 7, (7, 11, 4)),
    (3, 3, (1, 2)),
]


@pytest.mark.parametrize(("ranks", "heads", "streams"), SHARDS, ids=str)
def test_every_rank_gets_all_tokens_in_order_and_its_heads(ranks: int, heads: int, streams: tuple[int, ...]) -> None:
    tokens = tuple(zip(*(split_evenly(stream, ranks) for stream in streams), strict=True))
    whole = torch.randn(2, heads, sum(streams), 4)
    mask = torch.rand(2, 1, 1, sum(streams))

    def own(x: Tensor, rank: int, dim: int) -> Tensor:
        parts = x.split(streams, dim)
        return torch.cat([part.tensor_split(ranks, dim)[rank] for part in parts], dim)

    def work(rank: int, post: Post) -> tuple[Tensor, ...]:
        one = Simulated(post, rank, tokens, split_evenly(heads, ranks))
        gathered = one.gather(own(whole, rank, 2))
        seen = one.gather_mask(own(mask, rank, 3)), one.gather_mask(own(mask, rank, 3) > 0.5)
        return gathered, *seen, one.scatter(gathered[..., :3] + 1)

    for rank, (gathered, additive, boolean, back) in enumerate(on_all_ranks(ranks, work)):
        assert torch.equal(gathered, whole.tensor_split(ranks, 1)[rank])
        assert torch.equal(additive, mask) and torch.equal(boolean, mask > 0.5)
        assert torch.equal(back, own(whole, rank, 2)[..., :3] + 1)


@pytest.mark.parametrize("shape", [(2, 1, 1, 8), (2, 1, 4, 4), (2, 2, 1, 4)], ids=str)
def test_masks_over_anything_but_the_own_keys_are_refused(shape: tuple[int, ...]) -> None:
    one = Shards(None, 0, ((1, 3), (1, 3)), (1, 1))
    assert one.gather_mask(None) is None
    with pytest.raises(NotImplementedError, match=r"\(b, 1, 1, 4\), got \(2,"):
        one.gather_mask(torch.zeros(shape))


@pytest.mark.parametrize(
    ("layout", "tokens", "joint", "streams"),
    [
        (Layout(3, 4), 17, True, (5, 12)),
        (Layout(3, 4, after=6), 23, True, (5, 18)),  # a reference is of the picture's stream
        (Layout(3, 4, 2, before=0, after=None), 30, True, (24, 6)),
        (Layout(3, 4), 12, True, (0, 12)),
        (Layout(3, 4, 2), 24, False, (24,)),
    ],
    ids=str,
)
def test_streams(layout: Layout, tokens: int, joint: bool, streams: tuple[int, ...]) -> None:
    assert streams_of((layout,), tokens, joint) == streams
    assert streams_of((layout, layout), tokens, joint) == streams


def test_texts_of_several_lengths_are_refused() -> None:
    layouts = Layout(3, 4, before=2, after=None), Layout(3, 4, before=3, after=None)
    assert streams_of(layouts, 20, joint=False) == (20,)
    with pytest.raises(NotImplementedError, match="texts of several lengths"):
        streams_of(layouts, 20, joint=True)


def ulysses(**options: Any) -> Any:
    """A configuration of two ranks, of which this is the second, and no group."""
    config = diffusers.ContextParallelConfig(**{"ulysses_degree": 2, **options})
    config._ulysses_local_rank = 1
    config._ulysses_mesh = config._flattened_mesh = SimpleNamespace(get_group=lambda: None)  # type: ignore[assignment]
    return diffusers.ParallelConfig(context_parallel_config=config)


def reader(*layouts: Layout, joint: bool = True) -> Any:
    return lambda tokens: SimpleNamespace(layouts=layouts, splits_text=lambda: joint)


def test_the_shards_of_a_call() -> None:
    found = shards(ulysses(), torch.empty(1, 4, 9, 2), reader(Layout(3, 4)))
    assert found == Shards(None, 1, ((3, 6), (3, 6)), (2, 2))


@pytest.mark.parametrize(
    "options",
    [{"ulysses_degree": 1, "ring_degree": 2}, {"ring_degree": 2}, {"ring_degree": 2, "rotate_method": "allgather"}],
    ids=str,
)
def test_a_ring_is_refused(options: dict[str, Any]) -> None:
    degree = 2 * options.get("ulysses_degree", 2)
    with pytest.raises(
        NotImplementedError, match=rf"ring_degree=2.*use ContextParallelConfig\(ulysses_degree={degree}"
    ):
        shards(ulysses(**options), torch.empty(1, 4, 6, 2), reader(Layout(3, 4)))


@pytest.mark.parametrize("config", [object(), diffusers.ParallelConfig()], ids=["unknown", "empty"])
def test_other_parallelism_is_refused(config: Any) -> None:
    with pytest.raises(NotImplementedError, match="swapped attention runs under diffusers' context parallelism"):
        shards(config, torch.empty(1, 4, 6, 2), reader(Layout(3, 4)))


def test_heads_that_ranks_cannot_share_are_refused() -> None:
    with pytest.raises(ValueError, match="2 ranks as many heads, but the layer has 3.*ulysses_anything=True"):
        shards(ulysses(), torch.empty(1, 3, 6, 2), reader(Layout(3, 4)))
    with pytest.raises(ValueError, match="at least one head, but the layer has 1"):
        shards(ulysses(ulysses_anything=True), torch.empty(1, 1, 6, 2), reader(Layout(3, 4)))


def test_tokens_that_lie_otherwise_are_refused() -> None:
    with pytest.raises(ValueError, match=r"streams of 5, 13 tokens, .* as \[10, 8\], but the ranks have \[9, 9\]"):
        shards(ulysses(), torch.empty(1, 2, 9, 2), reader(Layout(1, 13)))


def test_tokens_of_all_ranks_are_counted() -> None:
    query = torch.empty(1, 2, 9, 2)
    assert count_tokens(ulysses(), query) == 18
    assert count_tokens(ulysses(ring_degree=2), query) == 36
    assert count_tokens(object(), query) == 9


def test_weights_for_each_head_are_refused_unless_the_rank_has_all() -> None:
    query = torch.empty(1, 4, 9, 8)
    pooled, agents = diffattn.ClearAttention(radius=2, down_factor=3), diffattn.AgentAttention.published((3, 3))
    state = torch.get_rng_state()
    check_mechanism(pooled, pooled.weights(4, 8), query, 2)
    assert torch.equal(torch.get_rng_state(), state)
    weights = agents.weights(4, 8)
    check_mechanism(agents, weights, query, 4)
    state = torch.get_rng_state()
    with pytest.raises(NotImplementedError, match=r"weights for each head \(an_bias\).* 2 of 4 heads"):
        check_mechanism(agents, weights, query, 2)
    assert torch.equal(torch.get_rng_state(), state)


def test_mechanisms_that_read_the_blocks_input_are_refused() -> None:
    with pytest.raises(NotImplementedError, match="compares the block's input"):
        check_mechanism(diffattn.AgentAttention(agents="merge"), None, torch.empty(1, 4, 9, 8), 4)


def test_the_models_own_plan_is_known() -> None:
    model = flux().model
    assert not is_parallel(model) and installed_plan(model) == {}
    with pytest.raises(NotImplementedError, match="splits nothing and by its own plan hidden_states, encoder_hidden"):
        splits_text(model)
    config = ulysses().context_parallel_config
    apply_context_parallel(model, config, model._cp_plan)
    model._parallel_config = ulysses()
    assert is_parallel(model) and splits_text(model)


def test_another_plan_is_refused() -> None:
    config = ulysses().context_parallel_config
    for model, changed in ((flux().model, ("txt_ids",)), (sd3().model, ())):
        own = flux().model._cp_plan
        plan = {**own, "": {name: how for name, how in own[""].items() if name not in changed}}
        plan[""] = {name: replace(how) for name, how in plan[""].items()}
        apply_context_parallel(model, config, plan)
        with pytest.raises(NotImplementedError, match="call enable_parallelism without cp_plan="):
            splits_text(model)
