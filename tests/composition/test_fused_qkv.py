"""Fused projections: one matrix for queries, keys and values. UNets alone get other processors for it."""

import pytest
import torch
from compositions import Composition, Count, prove
from hand_masks import TOLERANCE, error
from models import BUILDERS, sd15
from torch import Tensor

import diffattn


def fused(family: str) -> Composition:
    tiny = BUILDERS[family]()
    count = Count()

    def run() -> Tensor:
        with torch.no_grad():
            return tiny.run()

    def fuse() -> None:
        tiny.model.fuse_qkv_projections()
        count.watch(*(module for name, module in tiny.model.named_modules() if name.endswith(".to_qkv")))

    return Composition(
        target=tiny.model,
        run=run,
        layouts=((tiny.model, tiny.spatial),),
        on=fuse,
        off=tiny.model.unfuse_qkv_projections,
        used=count,
    )


@pytest.mark.parametrize(
    "family",
    [
        pytest.param("Flux", marks=pytest.mark.cell("Fused QKV projections", outcome="works")),
        pytest.param("Wan", marks=pytest.mark.cell("Fused QKV projections", outcome="works")),
        pytest.param(
            "SD1.5",
            marks=pytest.mark.cell(
                "Fused QKV projections",
                outcome="works",
                note="replaces the processors; the swap goes on over the new ones",
            ),
        ),
    ],
)
@pytest.mark.parametrize("order", ["before", "after"])
def test_fused_projections(family: str, order: str, caplog: pytest.LogCaptureFixture) -> None:
    prove(lambda: fused(family), order, caplog)


@pytest.mark.cell("Fused QKV projections", family="SD1.5", outcome="works")
@torch.no_grad()
def test_processors_that_come_back_after_restore_are_the_models_own() -> None:
    """A UNet keeps the processors that it had when it was fused, and these were ours."""
    tiny = sd15()
    own = tiny.run()
    diffattn.apply(tiny.model, "clear", radius=2)
    want = tiny.run()
    tiny.model.fuse_qkv_projections()
    diffattn.restore(tiny.model)
    tiny.model.unfuse_qkv_projections()
    assert torch.equal(tiny.run(), own)
    diffattn.apply(tiny.model, "clear", radius=2)
    assert torch.equal(tiny.run(), want)


@pytest.mark.cell("Fused QKV projections", family="SD1.5", outcome="works")
@torch.no_grad()
def test_the_swap_goes_on_through_fusing_and_unfusing() -> None:
    tiny = sd15()
    diffattn.apply(tiny.model, "clear", radius=2)
    want = tiny.run()
    tiny.model.fuse_qkv_projections()
    assert error(tiny.run(), want) < TOLERANCE
    assert "Fused" in type(next(iter(tiny.model.attn_processors.values()))).__name__
    tiny.model.unfuse_qkv_projections()
    assert torch.equal(tiny.run(), want)
