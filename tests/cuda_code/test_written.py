"""The kernels that Inductor writes for CUDA, interpreted, give the numbers of float64: forward and backward."""

import itertools
import re
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from cuda_code.checks import ERRORS, Check, check_routed, check_window, on_cuda, window, write_forward
from torch import Tensor

from diffattn import ClearAttention, HaloAttention, NeighborhoodAttention, RoutingAttention, TokenGrid
from diffattn.kernels import flex
from diffattn.kernels.routed import flex as routed_flex
from diffattn.kernels.routed import gather

pytestmark = pytest.mark.cuda_code
HALF, BRAIN, SINGLE = torch.float16, torch.bfloat16, torch.float32
CAUSAL = NeighborhoodAttention(kernel_size=5, dilation=(3, 2), is_causal=(False, True))

FORWARD = [
    Check("h100", ClearAttention(radius=6), TokenGrid(30, 27, before=13), heads=2, kv_heads=1),
    Check("a100", ClearAttention(radius=8), TokenGrid(16, 24, before=77), HALF, head_dim=72),
    Check("rtx4090", ClearAttention(radius=5), TokenGrid(20, 24, before=128), head_dim=160),
    Check("b200", ClearAttention(radius=4), TokenGrid(16, 24, before=200), head_dim=128, pooled=9),
    Check("rtx5090", ClearAttention(radius=5), TokenGrid(16, 24, before=5), SINGLE),
    Check("a100", ClearAttention(radius=4), TokenGrid(9, 12, frames=5, before=20)),
    Check("h100", ClearAttention(radius=4, radius_t=2), TokenGrid(9, 12, frames=5, after=3), HALF),
    Check("h100", HaloAttention(tile=8, halo=1), TokenGrid(24, 40, before=3)),
    Check("a100", HaloAttention(tile=(8, 16), halo=1), TokenGrid(21, 40)),
    Check("rtx4090", NeighborhoodAttention(kernel_size=7), TokenGrid(17, 23, before=1)),
    Check("h100", CAUSAL, TokenGrid(19, 22, before=7), HALF),
    Check("h100", ClearAttention(radius=5), TokenGrid(16, 20, before=40), batch=2, mask=True),
    Check("b200", ClearAttention(radius=3), TokenGrid(1, 1, before=2)),
]
BACKWARD = [
    Check("a100", ClearAttention(radius=5), TokenGrid(14, 19, before=13), heads=2, kv_heads=1, backward=True),
    Check("h100", ClearAttention(radius=3), TokenGrid(6, 10, frames=3, before=20), head_dim=128, backward=True),
    Check("rtx4090", HaloAttention(tile=8, halo=1), TokenGrid(16, 24, before=3), HALF, backward=True),
]
KINDS = [(BRAIN, 64), (HALF, 128), (BRAIN, 72), (BRAIN, 160)]
EVERY = list(
    itertools.product(
        ("a100", "rtx4090", "h100", "b200", "rtx5090"),
        ((ClearAttention(radius=6), 77), (HaloAttention(tile=8, halo=1), 0), (CAUSAL, 130)),
        (False, True),
        KINDS,
    )
)
MORE = [
    # every card with every mechanism in both directions, dtypes and head dims in turn
    *(
        Check(card, mechanism, TokenGrid(22, 26, before=text), dtype, head_dim=head_dim, backward=backward)
        for number, (card, (mechanism, text), backward, (dtype, head_dim)) in enumerate(EVERY)
        if number // len(KINDS) % len(KINDS) == number % len(KINDS)
    ),
    Check("h100", NeighborhoodAttention(kernel_size=(3, 5, 5)), TokenGrid(12, 18, frames=5, before=9), backward=True),
    Check("a100", ClearAttention(radius=16), TokenGrid(64, 64, before=512)),
]


def ids(checks: list[Check]) -> list[Any]:
    return [pytest.param(check, id=str(check)) for check in checks]


@pytest.mark.parametrize("check", ids(FORWARD))
def test_the_output_is_that_of_float64(check: Check, folder: Path) -> None:
    assert check_window(check, folder).output < ERRORS[check.dtype]


@pytest.mark.parametrize("check", ids(BACKWARD))
def test_output_and_gradients_are_those_of_float64(check: Check, folder: Path) -> None:
    found = check_window(check, folder)
    assert found.output < ERRORS[check.dtype]
    assert max(found.gradients.values()) < 2 * ERRORS[check.dtype], found.gradients


@pytest.mark.slow
@pytest.mark.parametrize("check", ids(MORE))
def test_the_whole_table(check: Check, folder: Path) -> None:
    found = check_window(check, folder)
    assert max(found.output, *(error / 2 for error in found.gradients.values()), 0) < ERRORS[check.dtype], found


PLANTED = Check("h100", ClearAttention(radius=6), TokenGrid(16, 24, before=140), HALF)


def drop_a_block(ordered: flex.Ordered) -> flex.Ordered:
    lists = ordered.blocks.lists
    fewer = lists._replace(partial_count=lists.partial_count - 1, partial=lists.partial.roll(-1, dims=-1))
    return ordered._replace(blocks=replace(ordered.blocks, lists=fewer))


def shift_the_keys(ordered: flex.Ordered) -> flex.Ordered:
    row, column = ordered.coordinates
    return ordered._replace(coordinates=(row, column.roll(1)))


def show_the_padding(ordered: flex.Ordered) -> flex.Ordered:
    further = ordered.blocks.lengths[1] - ordered.order.cells
    tables = flex.key_coordinates(ordered.order, further, further, "cpu")
    return ordered._replace(coordinates=tables)


def forget_the_text(ordered: flex.Ordered) -> flex.Ordered:
    lists = ordered.blocks.lists
    none = lists._replace(full_count=torch.zeros_like(lists.full_count))
    return ordered._replace(blocks=replace(ordered.blocks, lists=none))


@pytest.mark.parametrize("fault", [drop_a_block, shift_the_keys, show_the_padding, forget_the_text])
def test_a_planted_fault_is_found(fault: Any, folder: Path) -> None:
    ordered_call = flex.ordered_call
    with mock.patch.object(flex, "ordered_call", lambda call: fault(ordered_call(call))):
        assert check_window(PLANTED, folder).output > 3 * ERRORS[HALF]


def routed(mechanism: RoutingAttention, grid: TokenGrid, mask: Tensor | None = None) -> Any:
    """The mechanism's call of the kernels, two heads of float16, as it would come from a model."""
    found: list[Any] = []
    q, k, v = torch.randn(3, 1, 2, grid.tokens, 64, generator=torch.Generator().manual_seed(0)).to(HALF)
    take = mock.patch(
        "diffattn.mechanisms.parts.exact_tiles.run", lambda call, backend: found.append(call) or gather.route(call)
    )
    from diffattn.mechanisms.base import Context

    with take, torch.no_grad():
        mechanism.attend(q, k, v, grid, context=Context(mask=mask))
    return found[0]


ROUTED = {
    "tiles of 64 cells, a ragged grid": (RoutingAttention(top_k=3, tile=8, pool=4), TokenGrid(21, 26, before=5), False),
    "tiles of 128 cells": (RoutingAttention(top_k=2, tile=(8, 16), pool=4), TokenGrid(24, 32, before=130), False),
    "queries of 64, keys of 128": (
        RoutingAttention(top_k=2, tile=(8, 16), query_tile=8, pool=8), TokenGrid(16, 32), False,
    ),
    "order by content": (
        RoutingAttention(top_k=2, tile=8, pool=4, order="content"), TokenGrid(16, 24, before=3), False,
    ),
    "order by centroids, weighted means": (
        RoutingAttention(top_k=2, tile=8, pool=4, order="centroids", means="weighted"), TokenGrid(16, 24), True,
    ),
    "a mask for each head": (RoutingAttention(top_k=3, tile=8, pool=4), TokenGrid(16, 24, before=20), True),
}  # fmt: skip


@pytest.mark.parametrize("case", ROUTED)
@pytest.mark.parametrize("card", ["h100", "a100"])
def test_chosen_tiles_and_means_are_those_of_the_cpu(card: str, case: str, folder: Path) -> None:
    mechanism, grid, masked = ROUTED[case]
    mask = torch.rand(1, 2, 1, grid.tokens, generator=torch.Generator().manual_seed(2)) > 0.2 if masked else None
    call = routed(mechanism, grid, mask)
    chosen = gather.choose_in_strips(call)
    exact = call._replace(**{
        name: None if value is None else value.double() for name, value in call._asdict().items() if is_number(value)
    })  # fmt: skip
    want, _ = gather.route(exact, chosen)
    out = check_routed(card, routed_flex.prepare(call, chosen, cuda=True), folder)
    assert (out.double() - want.flatten(1, 2)).abs().max() < ERRORS[HALF]


def is_number(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def test_a_mean_too_many_is_found(folder: Path) -> None:
    mechanism, grid, _ = ROUTED["tiles of 64 cells, a ragged grid"]
    call = routed(mechanism, grid)
    chosen = gather.choose_in_strips(call)
    prepared = routed_flex.prepare(call, chosen, cuda=True)
    prepared = prepared._replace(seen=torch.ones_like(prepared.seen))
    want, _ = gather.route(call, chosen)
    assert (check_routed("h100", prepared, folder) - want.flatten(1, 2)).abs().max() > 3 * ERRORS[HALF]


def test_one_source_serves_all_texts_within_a_multiple_of_128(folder: Path) -> None:
    sources: dict[int, set[str]] = {}
    for text in (1, 13, 77, 127, 128, 129, 200, 256, 333, 512):
        call = window(Check("h100", ClearAttention(radius=4), TokenGrid(16, 24, before=text)))
        with on_cuda():
            ordered = flex.ordered_call(call)
        source = re.sub(r"^# AOT ID.*$", "", write_forward("h100", ordered).source, flags=re.M)  # it counts modules
        sources.setdefault(-(-text // 128), set()).add(source)
    assert {multiple: len(found) for multiple, found in sources.items()} == {1: 1, 2: 1, 3: 1, 4: 1}
