"""Whole pipelines of diffusers: each call of their models is swapped, on the grid of what is made.

Nothing here trusts the library's own masks: `hand_masks` lays others over the calls of the untouched models.
"""

import functools
from collections.abc import Iterator
from contextlib import ExitStack

import pytest
import torch
from hand_masks import RADIUS, TOLERANCE, error
from releases import needs
from torch import Tensor
from whole import WHOLE, Whole
from whole.case import MaskBySize

import diffattn

pytestmark = [
    needs("diffusers", "0.42", "some of the pipelines"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small spend nearly all their time waiting for a second thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@functools.cache
def build(name: str) -> Whole:
    return WHOLE[name]()


def under_masks(case: Whole, images: int) -> tuple[Tensor, int]:
    """What the untouched pipeline gives under the hand-made masks, and how many calls were masked."""
    with ExitStack() as stack:
        modes = [
            stack.enter_context(MaskBySize(getattr(case.pipe, part), layouts)) for part, layouts in case.layouts.items()
        ]
        output = case.run(images)
    assert not any(mode.missed for mode in modes), [mode.missed for mode in modes]
    return output, sum(mode.count for mode in modes)


@pytest.mark.parametrize("images", [1, 2])
@pytest.mark.parametrize("name", WHOLE)
def test_each_call_is_swapped_on_the_grid_of_what_is_made(name: str, images: int) -> None:
    case = build(name)
    if case.single and images > 1:
        return
    own = case.run(images)
    want, calls = under_masks(case, images)
    assert error(want, own) > 1e-3, "the mask changes nothing: the test proves nothing"
    with diffattn.apply(case.pipe, "clear", radius=RADIUS, components=[*case.layouts]) as handle:
        assert error(case.run(images), want) < TOLERANCE
        assert all(layer.reached for layer in handle.layers)
        assert diffattn.summary(case.pipe).calls == {"swapped": calls}
    with diffattn.apply(case.pipe, "softmax", components=[*case.layouts]):
        assert torch.equal(case.run(images), own)
    assert torch.equal(case.run(images), own)
