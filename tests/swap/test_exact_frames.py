"""`exact_frames=`: the first and last latent frames see all tokens and are seen by all."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from compositions import VISIBLE
from hand_masks import RADIUS, TOLERANCE, HandReference, Layouts, error, under_masks
from models import Tokens
from tiny_pipelines import TinyPipeline, cogvideox, flux, wan

import diffattn
from diffattn import ClearAttention, RoutingAttention, TokenGrid

WHOLE = TokenGrid(4, 5, frames=3)
"""The tiny video models'."""


def apart(layouts: Layouts, first: int, last: int) -> Layouts:
    """The same tokens with those frames beside the grid."""

    def off_the_grid(tokens: Tokens) -> Tokens:
        frame = tokens.rows * tokens.columns
        before, after = tokens.before + first * frame, tokens.after + last * frame
        return replace(tokens, before=before, frames=tokens.frames - first - last, after=after)

    return {name: tuple(map(off_the_grid, layout)) for name, layout in layouts.items()}


def masked(case: TinyPipeline, first: int, last: int, **options: Any) -> torch.Tensor:
    pairs = [(model, apart(layouts, first, last)) for model, layouts in case.pairs]
    return under_masks(case.run, *pairs, **options)


@pytest.mark.parametrize("frames", [(1, 0), (0, 1), (1, 1), (2, 0)])
@pytest.mark.parametrize("make", [wan, cogvideox])
def test_a_window_is_that_of_the_frames_between(make: Any, frames: tuple[int, int]) -> None:
    case = make()
    want, everywhere = masked(case, *frames), under_masks(case.run, *case.pairs)
    assert error(want, everywhere) > VISIBLE
    with diffattn.apply(case.pipe, "clear", radius=RADIUS, exact_frames=frames):
        assert error(case.run(), want) < TOLERANCE


@pytest.mark.parametrize(
    "mechanism",
    [
        RoutingAttention(top_k=1, tile=2, pool=2),
        RoutingAttention(top_k=1, tile=(1, 2, 2), pool=(1, 2, 2), order="content"),
        RoutingAttention(top_k=1, tile=(1, 2, 2), pool=(1, 2, 2), order="content", means="weighted"),
        ClearAttention(radius=RADIUS, pool=2),
    ],
    ids=str,
)
def test_choices_and_means_are_those_of_the_frames_between(mechanism: Any) -> None:
    case = wan()
    own, want = case.run(), masked(case, 1, 0, mode=HandReference, mechanism=mechanism)
    assert error(want, own) > VISIBLE
    with diffattn.apply(case.pipe, mechanism, exact_frames=(1, 0)):
        assert error(case.run(), want) < 10 * TOLERANCE


def test_they_are_counted_and_told() -> None:
    case = wan()
    with diffattn.apply(case.pipe, "clear", radius=1, exact_frames=(1, 1)) as handle:
        case.run()
        told = diffattn.summary(case.pipe)
        assert {str(layer.grid) for layer in handle.layers} == {"20+4x5+20"}
    assert told.share == pytest.approx((60 * 60 - 20 * 20 + 20) / 60**2)
    assert "exact_frames= takes frames off the grid" in str(told)


def test_an_image_has_none() -> None:
    case = flux()
    with diffattn.apply(case.pipe, "clear", radius=RADIUS):
        want = case.run()
    with diffattn.apply(case.pipe, "clear", radius=RADIUS, exact_frames=(1, 1)):
        assert torch.equal(case.run(), want)


def test_one_frame_must_be_left() -> None:
    case = wan()
    with (
        diffattn.apply(case.pipe, "clear", radius=RADIUS, exact_frames=(2, 1)),
        pytest.raises(ValueError, match=r"exact_frames=\(2, 1\) leaves none of the 3 frames"),
    ):
        case.run()


@pytest.mark.parametrize("wrong", [1, (1,), (1, -1), "first", (0.5, 0)])
def test_two_counts_are_asked_for(wrong: Any) -> None:
    with pytest.raises(ValueError, match="exact_frames must be"):
        diffattn.apply(wan().pipe, "clear", radius=RADIUS, exact_frames=wrong)


def test_the_grid_says_which_tokens_stay() -> None:
    assert str(WHOLE.with_exact_frames(1, 1)) == "20+4x5+20"
    assert str(TokenGrid(4, 5, frames=3, before=7, after=2).with_exact_frames(0, 2)) == "7+4x5+42"
    assert WHOLE.with_exact_frames(0, 0) is WHOLE and WHOLE.with_exact_frames(1, 1).tokens == WHOLE.tokens
