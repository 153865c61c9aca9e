"""What can't be swapped is refused by name before anything is changed, with a row of one's own too."""

from typing import Any

import diffusers
import models
import pytest
import torch
from diffusers.models import attention_dispatch
from diffusers.models.transformers.transformer_flux2 import Flux2KVAttnProcessor
from models import flux, flux2, qwen_image
from tiny_pipelines import tiny_vae
from torch import Tensor

import diffattn
from diffattn.families import FAMILIES, Family, Layers, picture
from diffattn.swap.unsupported import UNSUPPORTED


@pytest.fixture
def families(monkeypatch: pytest.MonkeyPatch) -> list[Family]:
    """The rows, to add to for one test."""
    rows = [*FAMILIES]
    monkeypatch.setattr("diffattn.families.FAMILIES", rows)
    return rows


TINY: dict[str, dict[str, Any]] = {
    "PRXTransformer2DModel": dict(
        in_channels=4, context_in_dim=12, hidden_size=16, num_heads=2, depth=1, axes_dim=[4, 4]
    ),
    "NucleusMoEImageTransformer2DModel": dict(
        in_channels=4,
        out_channels=4,
        num_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=12,
        axes_dims_rope=(4, 6, 6),
        moe_enabled=False,
        mlp_ratio=8,
    ),
    "Cosmos3OmniTransformer": dict(
        head_dim=8,
        hidden_size=16,
        intermediate_size=16,
        latent_channel=4,
        num_attention_heads=2,
        num_hidden_layers=1,
        num_key_value_heads=1,
        patch_latent_dim=16,
        vocab_size=8,
        rope_axes_dim=(2, 1, 1),
    ),
    "StableCascadeUNet": dict(
        in_channels=4,
        out_channels=4,
        conditioning_dim=8,
        block_out_channels=(8, 8),
        num_attention_heads=(2, 2),
        down_num_layers_per_block=(1, 1),
        up_num_layers_per_block=(1, 1),
        clip_text_pooled_in_channels=8,
    ),
}


@pytest.mark.parametrize("mechanism", ["clear", "softmax"])
@pytest.mark.parametrize("name", TINY)
def test_fewer_queries_than_keys(name: str, mechanism: str, families: list[Family]) -> None:
    """What a row of one's own got: dense attention, and then the blame on diffusers' release."""
    model = getattr(diffusers, name)(**TINY[name])
    families.append(Family("mine", (name,), (Layers(r".*att\w*", "spatial", picture()),)))
    before = {key: module.processor for key, module in model.named_modules() if hasattr(module, "processor")}
    assert before
    options = {"radius": 2} if mechanism == "clear" else {}
    with pytest.raises(ValueError, match=f"attention of {name} can't be swapped: .* fewer queries than keys"):
        diffattn.apply(model, mechanism, **options)
    assert all(model.get_submodule(key).processor is own for key, own in before.items())
    assert not hasattr(model, "_diffattn")


def test_every_name_is_of_diffusers() -> None:
    """A class that is renamed would be taken again without a word."""
    for entry in UNSUPPORTED:
        places = [diffusers, diffusers.models.transformers.transformer_flux2, diffusers.models.transformers]
        assert any(hasattr(place, entry.name) for place in places), entry.name


def test_attention_to_cached_references() -> None:
    tiny = flux2()
    diffattn.apply(tiny.model, "clear", radius=2).restore()
    pipe = diffusers.Flux2KleinKVPipeline(
        diffusers.FlowMatchEulerDiscreteScheduler(), None, None, None, transformer=tiny.model
    )
    with pytest.raises(ValueError, match="attention of Flux2KleinKVPipeline can't be swapped: .* cached keys of ref"):
        diffattn.apply(pipe, "clear", radius=2)
    with pytest.raises(ValueError, match="attention of Flux2KVAttnProcessor can't be swapped: .* cached keys of ref"):
        diffattn.apply(tiny.model, "clear", radius=2)
    assert type(tiny.model.transformer_blocks[0].attn.processor) is Flux2KVAttnProcessor


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
    with pytest.raises(ValueError, match=r"OneCallInAHelper can't be swapped: .* computed in attend_somehow\(\)"):
        diffattn.apply(tiny.model, "clear", radius=2)
    diffattn.apply(tiny.model, "clear", radius=2, layers=["transformer_blocks.0.*", "single*"])


def test_pictures_made_in_layers() -> None:
    """Of several images in a sequence the first alone had a window."""
    tiny = qwen_image()
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    pipe = diffusers.QwenImageLayeredPipeline(scheduler, None, None, None, None, tiny.model)
    with pytest.raises(ValueError, match="attention of QwenImageLayeredPipeline can't be swapped: it makes several"):
        diffattn.apply(pipe, "clear", radius=2)
    diffattn.apply(tiny.model, "clear", radius=2).restore()
    layered = qwen_image(use_layer3d_rope=True, use_additional_t_cond=True).model
    with pytest.raises(ValueError, match="attention of QwenImageTransformer2DModel can't be swapped: it makes several"):
        diffattn.apply(layered, "clear", radius=2)
    modular = diffusers.QwenImageLayeredModularPipeline
    target = type("Mine", (modular,), {"__init__": lambda self: None, "components": {"transformer": tiny.model}})()
    with pytest.raises(ValueError, match="attention of Mine can't be swapped: it makes several"):
        diffattn.apply(target, "clear", radius=2)


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


def rows_of_pictures(*sizes: tuple[int, int]) -> Tensor:
    """The ids that VisualCloze gives: rows of examples numbered from 1, the last with the image that is made."""
    rows = [models.picture_ids(*size) for size in sizes]
    for number, row in enumerate(rows, start=1):
        row[:, 0] = number
    return torch.cat(rows)


@torch.no_grad()
def test_examples_in_the_sequence() -> None:
    tiny = flux()
    scheduler, vae = diffusers.FlowMatchEulerDiscreteScheduler(), tiny_vae(latent_channels=1)
    for name in ("VisualClozePipeline", "VisualClozeGenerationPipeline"):
        pipe = getattr(diffusers, name)(scheduler, vae, None, None, None, None, tiny.model)
        with pytest.raises(ValueError, match=f"attention of {name} can't be swapped: it puts example images"):
            diffattn.apply(pipe, "clear", radius=2)
    diffattn.apply(tiny.model, "clear", radius=2)
    for dtype in (torch.float32, torch.bfloat16):
        ids = rows_of_pictures((6, 9), (6, 9), (3, 8)).to(dtype)
        with pytest.raises(ValueError, match="img_ids list 3 images that begin with number 1, as those of VisualClo"):
            tiny.run(hidden_states=models.draw(2, len(ids), 4), img_ids=ids)
    tiny.run(img_ids=rows_of_pictures((6, 9)))  # no examples: one image
    diffattn.restore(tiny.model)
    tiny.run(hidden_states=models.draw(2, len(ids), 4), img_ids=ids)
