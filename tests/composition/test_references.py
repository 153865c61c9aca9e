"""Pipelines that edit: a window over the image that is made, while the images it is made from are seen whole."""

from typing import Any

import diffusers
import models
import pytest
import torch
from compositions import VISIBLE
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus
from hand_masks import RADIUS, TOLERANCE, error, under_masks
from models import TEXT, Tokens
from PIL import Image
from tiny_pipelines import TinyPipeline, flux_call, tiny_vae

import diffattn


def picture(width: int, height: int) -> Image.Image:
    pixels = torch.randint(0, 256, (height, width, 3), generator=torch.Generator().manual_seed(width))
    return Image.fromarray(pixels.byte().numpy())


def kontext() -> TinyPipeline:
    """Makes an image of 16 x 24 pixels, 4 x 6 tokens, from one of 12 x 20 pixels, 3 x 5 tokens."""
    pipe = diffusers.FluxKontextPipeline(
        diffusers.FlowMatchEulerDiscreteScheduler(),
        tiny_vae(latent_channels=1, shift_factor=0.0),
        None,
        None,
        None,
        None,
        models.flux().model,
    )
    call = {**flux_call(), "image": picture(20, 12), "max_area": 16 * 24, "_auto_resize": False}
    return TinyPipeline(pipe, call, {"transformer": kontext_layouts(3 * 5)})


def kontext_layouts(references: int) -> dict[str, tuple[Tokens, ...]]:
    return {r"(single_)?transformer_blocks\.\d+\.attn": (Tokens(TEXT, 1, 4, 6, references),)}


def qwen_image_edit_plus() -> TinyPipeline:
    """Makes an image of 6 x 9 tokens from one of 8 x 6 and one of 6 x 8; the guidance has a shorter text."""
    vae = diffusers.AutoencoderKLQwenImage(
        base_dim=4, z_dim=1, dim_mult=[1, 1, 1, 1], num_res_blocks=1, latents_mean=[0.0], latents_std=[1.0]
    )
    pipe = diffusers.QwenImageEditPlusPipeline(
        diffusers.FlowMatchEulerDiscreteScheduler(), vae, None, None, None, models.qwen_image(out_channels=1).model
    )
    call = {
        "image": [picture(96, 128), picture(128, 96)],
        "prompt_embeds": models.draw(1, TEXT, 12),
        "prompt_embeds_mask": torch.ones(1, TEXT, dtype=torch.long),
        "negative_prompt_embeds": -models.draw(1, TEXT, 12),
        "negative_prompt_embeds_mask": models.text_mask(TEXT, 3)[1:].long(),
        "height": 96,
        "width": 144,
        "num_inference_steps": 3,
    }
    return TinyPipeline(pipe, call, {"transformer": qwen_layouts(8 * 6 + 6 * 8)})


def qwen_layouts(references: int) -> dict[str, tuple[Tokens, ...]]:
    return {r"transformer_blocks\.\d+\.attn": (Tokens(TEXT, 1, 6, 9, references),)}


@pytest.fixture(autouse=True)
def small_references(monkeypatch: pytest.MonkeyPatch) -> None:
    """Qwen-Image scales every reference to this area, 1024 x 1024 otherwise."""
    monkeypatch.setattr(pipeline_qwenimage_edit_plus, "VAE_IMAGE_SIZE", 96 * 128)


def check_other_references(case: TinyPipeline, *others: tuple[Any, dict[str, tuple[Tokens, ...]]]) -> None:
    """Calls with other references under one swap."""
    calls = [(case.call["image"], case.layouts["transformer"]), *others]
    wants = []
    for image, layouts in calls:
        case.call["image"] = image
        wants.append(under_masks(case.run, (case.pipe.transformer, layouts)))
    assert all(error(want, wants[0]) > VISIBLE for want in wants[1:]), "the references change nothing"
    with diffattn.apply(case.pipe, "clear", radius=RADIUS):
        for (image, _), want in zip(calls, wants, strict=True):
            case.call["image"] = image
            assert error(case.run(), want) < TOLERANCE


@pytest.mark.cell("Reference images", family="Flux-Kontext", outcome="works", note="of another size, seen whole")
def test_kontext_with_a_reference_of_another_size() -> None:
    kontext().check_swap()
    check_other_references(
        kontext(),
        (picture(8, 28), kontext_layouts(7 * 2)),
        (picture(24, 16), kontext_layouts(24)),
        (None, kontext_layouts(0)),
    )


@pytest.mark.cell("Reference images", family="Qwen-Image-Edit", outcome="works", note="two of other sizes, seen whole")
def test_qwen_image_edit_with_two_references() -> None:
    qwen_image_edit_plus().check_swap()
    check_other_references(
        qwen_image_edit_plus(),
        ([picture(128, 96), picture(96, 128)], qwen_layouts(96)),
        ([picture(96, 96)], qwen_layouts(6 * 6)),
    )
