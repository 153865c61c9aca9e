"""Masks that models bring along: over queries and keys for the padding's sake, or for every query its own."""

from typing import Any

import pytest
import torch
from models import BUILDERS
from releases import built
from torch import Tensor

import diffattn
from diffattn import ClearAttention
from diffattn.mechanisms.base import Context
from scripts.support_table import mechanisms


@torch.no_grad()
@pytest.mark.parametrize("name", built(["Chroma", "HunyuanVideo-1.5", "Ideogram4", "LuminaNext"]))
def test_a_mask_on_padding_is_one_on_keys(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over queries and keys no kernel but the dense one takes it, and `agent` and `linear` refuse it."""
    masks: list[Tensor | None] = []
    own = ClearAttention.attend

    def note(self: Any, *tensors: Any, context: Context, **options: Any) -> Tensor:
        masks.append(context.mask)
        return own(self, *tensors, context=context, **options)

    monkeypatch.setattr(ClearAttention, "attend", note)
    tiny = BUILDERS[name]()
    with diffattn.apply(tiny.model, "clear", radius=2) as handle:
        tiny.run()
    assert len(masks) == len(handle.layers)
    for mask in masks:
        assert mask is not None and mask.shape[2] == 1
        assert not mask.all() or name == "LuminaNext"  # which pads nothing at one size


@torch.no_grad()
@pytest.mark.parametrize("mechanism", mechanisms(), ids=lambda mechanism: mechanism.type)
def test_masks_of_every_query_are_refused_by_what_takes_one_for_all(mechanism: Any) -> None:
    tiny = BUILDERS["OmniGen"]()
    if not mechanism.one_mask:
        with diffattn.apply(tiny.model, mechanism, layers="*"):
            assert tiny.run().isfinite().all()
        return
    with pytest.raises(ValueError, match=f"each query has a mask of its own, and {mechanism.type} takes one for all"):
        diffattn.apply(tiny.model, mechanism)
    assert not hasattr(tiny.model, "_diffattn")
