"""What can't be swapped is refused by name before anything is changed, with a row of one's own too."""

from typing import Any

import diffusers
import models
import pytest
from diffusers.models import attention_dispatch
from models import flux
from torch import Tensor

import diffattn
from diffattn.families import FAMILIES, Family
from diffattn.swap.unsupported import UNSUPPORTED


@pytest.fixture
def families(monkeypatch: pytest.MonkeyPatch) -> list[Family]:
    """The rows, to add to for one test."""
    rows = [*FAMILIES]
    monkeypatch.setattr("diffattn.families.FAMILIES", rows)
    return rows


def test_every_name_is_of_diffusers() -> None:
    """A class that is renamed would be taken again without a word."""
    transformers = diffusers.models.transformers
    places = [diffusers, transformers, *vars(transformers).values()]
    for entry in UNSUPPORTED:
        assert any(hasattr(place, entry.name) for place in places), entry.name


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return attention_dispatch.dispatch_attention_fn(query, key, value)


def attend_somehow(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return attend(query, key, value)


dispatch_attention_fn = attention_dispatch.dispatch_attention_fn


class OneCallInAHelper:
    """Half of its calls can be swapped; the others would stay dense without a word."""

    def __call__(self, attn: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if len(hidden_states) > 1:
            return attend_somehow(hidden_states, hidden_states, hidden_states)
        return dispatch_attention_fn(hidden_states, hidden_states, hidden_states)


def test_attention_in_a_helper_function() -> None:
    tiny = flux()
    tiny.model.transformer_blocks[1].attn.processor = OneCallInAHelper()
    with pytest.raises(
        ValueError, match=r"OneCallInAHelper can't be swapped: .* computed in attend\(\), attend_somehow\(\)"
    ):
        diffattn.apply(tiny.model, "clear", radius=2)
    diffattn.apply(tiny.model, "clear", radius=2, layers=["transformer_blocks.0.*", "single*"])


GIVEN = {
    "ZImageOmniPipeline": ("Z-Image", "transformer", "several images into one sequence"),
    "DreamLitePipeline": ("DreamLite", "unet", "a given image beside the one it makes"),
    "DreamLiteMobilePipeline": ("DreamLite", "unet", "a given image beside the one it makes"),
    "LEditsPPPipelineStableDiffusion": ("SD1.5", "unet", "attention processors of its own in every call"),
    "LEditsPPPipelineStableDiffusionXL": ("SDXL", "unet", "attention processors of its own in every call"),
    "StableDiffusionAttendAndExcitePipeline": ("SD1.5", "unet", "attention processors of its own in every call"),
    "StableDiffusionPix2PixZeroPipeline": ("SD1.5", "unet", "attention processors of its own in every call"),
    "StableDiffusionPanoramaPipeline": ("SD1.5", "unet", "copies of its scheduler's state"),
    "StableDiffusionSAGPipeline": ("SD1.5", "unet", "attention processors of its own in every call"),
    "TextToVideoZeroPipeline": ("SD1.5", "unet", "attention processors of its own in every call"),
    "TextToVideoZeroSDXLPipeline": ("SDXL", "unet", "attention processors of its own in every call"),
}
"""Pipelines whose models can be swapped by themselves -> a tiny model, its part's name, and a part of the reason."""


@pytest.mark.parametrize("name", GIVEN)
def test_pipelines_that_use_a_model_in_a_way_of_their_own(name: str) -> None:
    """What they made was dense, or had its window on a given image."""
    family, part, reason = GIVEN[name]
    model = models.BUILDERS[family]().model
    components = {"__init__": lambda self: None, "components": {part: model}}
    target = type("Mine", (getattr(diffusers, name),), components)()
    with pytest.raises(ValueError, match=f"attention of Mine can't be swapped: .*{reason}"):
        diffattn.apply(target, "clear", radius=2)
    assert not hasattr(model, "_diffattn")
