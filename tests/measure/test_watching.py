"""One call of a layer caught in a run, and what its queries saw."""

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline
from tolerances import assert_close

import diffattn
from diffattn import ClearAttention, HaloAttention, RoutingAttention, TokenGrid, tiny
from diffattn.measure.watching import watch
from diffattn.mechanisms.base import Mechanism

ROUTING = RoutingAttention(share=0.5, tile=2, pool=2)


@pytest.fixture(scope="module")
def pipe() -> Any:
    pipe = FluxPipeline.from_pretrained(tiny.path("flux"))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run(pipe: Any) -> np.ndarray:
    call = {**tiny.defaults("flux"), "num_inference_steps": 3}
    picture: np.ndarray = pipe(
        "a red circle", generator=torch.Generator().manual_seed(0), output_type="np", **call
    ).images
    return picture


def test_watching_changes_nothing_and_is_undone(pipe: Any) -> None:
    own = run(pipe)
    with diffattn.apply(pipe, ROUTING):
        want = run(pipe)
    got, caught = watch(pipe, ROUTING, lambda: run(pipe), layer="single_transformer_blocks.2", step=1)
    np.testing.assert_array_equal(got, want)
    np.testing.assert_array_equal(run(pipe), own)
    assert (caught.layer, caught.step) == ("single_transformer_blocks.2.attn", 1)
    assert caught.grid == TokenGrid(16, 16, before=32)


def test_layers_and_steps_are_told_apart(pipe: Any) -> None:
    calls = {
        (layer, step): watch(pipe, ROUTING, lambda: run(pipe), layer=layer, step=step)[1].q
        for layer in ("transformer_blocks.0.attn", "single_transformer_blocks.1.attn")
        for step in (0, 2)
    }
    several = list(calls.values())
    assert all(not torch.equal(one, other) for i, one in enumerate(several) for other in several[:i])


@pytest.mark.parametrize(
    "mechanism",
    [
        ROUTING,
        RoutingAttention(share=0.5, tile=2, pool=2, order="content"),
        RoutingAttention(share=1),
        ClearAttention(radius=3),
        ClearAttention(radius=3, pool=4),
        HaloAttention(tile=4, pool=2),
    ],
    ids=str,
)
def test_what_is_seen_gives_the_output(pipe: Any, mechanism: Mechanism) -> None:
    """Softmax over just these keys and means is what the mechanism computes."""
    _, caught = watch(pipe, mechanism, lambda: run(pipe))
    q, k, v = (tensor.double() for tensor in (caught.q, caught.k, caught.v))
    keys, means, blocks = caught.seen()
    count = blocks.double().sum(-1, keepdim=True)
    cells = [caught.grid.split(x)[0] for x in (k, v)]
    mean_k, mean_v = (blocks.double() @ x / count for x in cells)
    logits = [caught.scale * q @ k.mT, caught.scale * q @ mean_k.mT + count.log().mT]
    hidden = torch.cat([~keys.expand_as(logits[0]), ~means.expand_as(logits[1])], -1)
    weights = torch.cat(logits, -1).masked_fill(hidden, -torch.inf).softmax(-1)
    out = mechanism.attend(caught.q, caught.k, caught.v, caught.grid, scale=caught.scale)
    assert_close(out, weights @ torch.cat([v, mean_v], 2))
    assert_close(caught.weights(0, 1, 40), (caught.scale * q @ k.mT).softmax(-1)[0, 1, 40])


@pytest.mark.parametrize(
    ("where", "words"),
    [
        ({"layer": "nowhere"}, "'nowhere' is no swapped layer; name one of transformer_blocks.0.attn"),
        ({"layer": "blocks"}, "'blocks' is more than one swapped layer"),
        ({"head": 9}, "heads 0 to 3, got head=9"),
        ({"step": 3}, "steps 0 to 2, got step=3"),
    ],
)
def test_what_is_not_there_is_named_and_the_swap_undone(pipe: Any, where: dict[str, Any], words: str) -> None:
    own = run(pipe)
    with pytest.raises(ValueError, match=words):
        watch(pipe, ROUTING, lambda: run(pipe), **where)
    np.testing.assert_array_equal(run(pipe), own)


def test_a_look_is_of_one_query(pipe: Any) -> None:
    _, caught = watch(pipe, ROUTING, lambda: run(pipe), layer="single_transformer_blocks.2", step=1)
    seen, grid = caught.seen(), caught.grid
    look = caught.look(1, 5, 7)
    token = grid.before + 5 * grid.width + 7
    np.testing.assert_array_equal(look.keys, seen.keys[0, 1, token, grid.cell_slice])
    assert len(look.blocks) == seen.means[0, 1, token].sum()
    np.testing.assert_array_equal(look.mass, caught.weights(0, 1, token))
    assert caught.look(1, 5, 7, seen).keys.tobytes() == look.keys.tobytes() != caught.look(1, 0, 0).keys.tobytes()
