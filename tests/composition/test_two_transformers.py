"""Wan 2.2: one transformer for the noisy steps and one for the others, behind one swap."""

from contextlib import ExitStack
from typing import Any

import pytest
import torch
from compositions import VISIBLE, Count
from hand_masks import RADIUS, TOLERANCE, HandMask, error, under_masks
from tiny_pipelines import TinyPipeline, wan
from torch import Tensor

import diffattn
from diffattn import RoutingAttention
from diffattn.mechanisms.base import Context

STEPS = 5
LATER_LAYER = "blocks.0.attn1"

pytestmark = pytest.mark.cell("Two transformers (Wan 2.2)", family="Wan", outcome="works")


def wan22() -> TinyPipeline:
    """The second transformer has other weights; with flow sigmas the boundary lies between the steps 2 and 3."""
    low_noise = wan().pipe.transformer
    with torch.no_grad():
        for parameter in low_noise.parameters():
            parameter.mul_(0.9)
    case = wan(STEPS, transformer_2=low_noise, boundary_ratio=0.5)
    case.layouts["transformer_2"] = case.layouts["transformer"]
    return case


def counts(case: TinyPipeline) -> tuple[Count, Count]:
    high, low = Count(), Count()
    high.watch(case.pipe.transformer)
    low.watch(case.pipe.transformer_2)
    return high, low


def test_both_are_swapped_used_and_restored() -> None:
    case = wan22()
    high, low = counts(case)
    case.run()
    # two calls a step
    assert (high(), low()) == (6, 4)
    case.check_swap()
    with diffattn.apply(case.pipe, "clear", radius=RADIUS) as handle:
        assert len(handle.layers) == 4
        assert {id(layer.module) for layer in handle.layers} == {
            id(model.get_submodule(name)) for model in case.models for name in ("blocks.0.attn1", "blocks.1.attn1")
        }


@pytest.mark.parametrize("part", ["transformer", "transformer_2"])
def test_one_of_them_can_be_swapped_alone(part: str) -> None:
    case = wan22()
    both = under_masks(case.run, *case.pairs)
    case.layouts = {part: case.layouts[part]}
    assert error(under_masks(case.run, *case.pairs), both) > VISIBLE
    case.check_swap(components=[part])


@pytest.mark.parametrize(("first", "end"), [(1, 4), (0, 2), (3, 5)])
def test_steps_are_counted_across_the_boundary(first: int, end: int) -> None:
    """The masks by hand are hung and taken away between the steps."""
    case, stack = wan22(), ExitStack()

    def hang(step: int) -> None:
        if step == first:
            for model, layouts in case.pairs:
                stack.enter_context(HandMask(model, layouts, RADIUS))
        if step == end:
            stack.close()

    def after_step(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        hang(step + 1)
        return tensors

    def by_hand() -> Tensor:
        hang(0)
        case.call["callback_on_step_end"] = after_step
        output = case.run()
        del case.call["callback_on_step_end"]
        return output

    own, everywhere, want = case.run(), under_masks(case.run, *case.pairs), by_hand()
    assert min(error(want, own), error(want, everywhere)) > VISIBLE
    with diffattn.apply(case.pipe, "clear", radius=RADIUS, steps=slice(first, end)):
        for _ in range(2):
            assert error(case.run(), want) < TOLERANCE
    assert torch.equal(case.run(), own)


@pytest.mark.parametrize("order", ["content", "centroids"])
def test_each_half_of_guidance_keeps_its_own_order_of_keys_and_outputs(
    order: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four layers in all, two calls a step: as many memories, each of one layer and one prompt."""
    case, given = wan22(), []
    own = RoutingAttention.attend

    def noted(self: Any, q: Tensor, *rest: Any, context: Context, **options: Any) -> Tensor:
        given.append(context.memory)
        return own(self, q, *rest, context=context, **options)

    monkeypatch.setattr(RoutingAttention, "attend", noted)
    mechanism = RoutingAttention(top_k=1, tile=(1, 2, 2), pool=(1, 2, 2), order=order, refresh=2)
    with diffattn.apply(case.pipe, mechanism):
        case.run()
    distinct = {id(memory): memory for memory in given}
    assert len(given) == 2 * 2 * STEPS and len(distinct) == 2 * 2 * 2
    with diffattn.apply(case.pipe, mechanism, reuse=2):
        case.run()
        calls = diffattn.summary(case.pipe).calls
    assert calls == {
        "swapped": 2 * 2 * 4,
        "with the output of an earlier step": 2 * 2,
    }  # 0, 2, 3 (the first of the other) and 4
