"""IP-Adapter: its loader gives every layer a new processor, and its processors attend a second time, to an image."""

from collections.abc import Callable
from typing import Any

import pytest
import tiny_pipelines
import torch
from compositions import VISIBLE, Composition, prove
from hand_masks import RADIUS, TOLERANCE, error, under_masks
from models import Tokens, draw, flux, picture_ids
from tiny_pipelines import TinyPipeline
from torch import Tensor

import diffattn

FEATURES, TEXT_WIDTH = 6, 12
EMBEDDING = draw(1, 1, FEATURES)
"""What an image encoder makes of one image."""


Prompted = tuple[TinyPipeline, Callable[[], None], list[Tensor], tuple[str, ...]]
"""A pipeline, what loads its adapter, and the image prompt with the names of the arguments that take it."""


def image_projection() -> dict[str, Tensor]:
    """From the picture's embedding to four tokens."""
    return {
        "proj.weight": draw(4 * TEXT_WIDTH, FEATURES),
        "proj.bias": draw(4 * TEXT_WIDTH),
        "norm.weight": torch.ones(TEXT_WIDTH),
        "norm.bias": torch.zeros(TEXT_WIDTH),
    }


def flux_weights(pipe: Any) -> dict[str, dict[str, Tensor]]:
    """Keys and values for every double block."""
    blocks, width = pipe.transformer.config.num_layers, pipe.transformer.inner_dim
    layers = {}
    for i in range(blocks):
        for j, name in enumerate(("to_k_ip", "to_v_ip")):
            layers[f"{i}.{name}.weight"] = (i + 1) * draw(width, TEXT_WIDTH + j)[:, :TEXT_WIDTH]
            layers[f"{i}.{name}.bias"] = draw(width)
    return {"image_proj": image_projection(), "ip_adapter": layers}


def unet_weights(pipe: Any) -> dict[str, dict[str, Tensor]]:
    """Keys and values for every cross-attention, by its place among all layers."""
    layers = {}
    cross = [name for name in pipe.unet.attn_processors if name.endswith("attn2.processor")]
    for i, name in enumerate(cross):
        width = pipe.unet.get_submodule(name.removesuffix(".processor")).to_k.out_features
        for j, projection in enumerate(("to_k_ip", "to_v_ip")):
            layers[f"{2 * i + 1}.{projection}.weight"] = draw(width, TEXT_WIDTH + j)[:, :TEXT_WIDTH]
    return {"image_proj": image_projection(), "ip_adapter": layers}


def flux_pipeline() -> Prompted:
    tiny = tiny_pipelines.flux(steps=2)
    weights = flux_weights(tiny.pipe)
    return (
        tiny,
        lambda: tiny.pipe.load_ip_adapter(weights, "", image_encoder_pretrained_model_name_or_path=None),
        [EMBEDDING],
        ("ip_adapter_image_embeds", "negative_ip_adapter_image_embeds"),
    )


def sd15_pipeline() -> Prompted:
    tiny = tiny_pipelines.sd15(steps=2)
    weights = unet_weights(tiny.pipe)
    guided = torch.cat([torch.zeros_like(EMBEDDING), EMBEDDING])
    return (
        tiny,
        lambda: tiny.pipe.load_ip_adapter(weights, "", "", image_encoder_folder=None),
        [guided],
        ("ip_adapter_image_embeds",),
    )


PIPELINES = {"Flux": flux_pipeline, "SD1.5": sd15_pipeline}
families = pytest.mark.parametrize("family", PIPELINES)
works = pytest.mark.cell(
    "IP-Adapter",
    outcome="works",
    note="replaces the processors, and the swap goes on over the new ones; attention to the image prompt stays dense",
)


def prompted(family: str) -> Composition:
    """A pipeline that is given the image prompt once it has its adapter."""
    tiny, load, embeddings, arguments = PIPELINES[family]()
    (name,) = tiny.layouts
    model = getattr(tiny.pipe, name)

    def run() -> Tensor:
        loaded = getattr(model, "encoder_hid_proj", None) is not None
        tiny.call |= {name: embeddings if loaded else None for name in arguments}
        return tiny.run()

    return Composition(
        target=tiny.pipe,
        run=run,
        layouts=((model, tiny.layouts[name]),),
        on=load,
        off=tiny.pipe.unload_ip_adapter,
        prompts=True,
    )


@works
@families
@pytest.mark.parametrize("order", ["before", "after"])
def test_picture_prompts(family: str, order: str, caplog: pytest.LogCaptureFixture) -> None:
    prove(lambda: prompted(family), order, caplog)


@works
@families
def test_the_scale_is_set_under_a_swap_and_outlasts_it(family: str) -> None:
    reference, case = prompted(family), prompted(family)
    reference.on()
    loud = reference.run()
    reference.target.set_ip_adapter_scale(0.3)
    own, want = reference.run(), reference.by_hand()
    assert error(own, loud) > VISIBLE

    case.on()
    case.apply()
    case.target.set_ip_adapter_scale(0.3)
    assert error(case.run(), want) < TOLERANCE
    case.apply()
    assert error(case.run(), want) < TOLERANCE
    diffattn.restore(case.target)
    assert torch.equal(case.run(), own)


@pytest.mark.cell("IP-Adapter", family="Flux", outcome="works")
@torch.no_grad()
def test_a_picture_prompt_with_as_many_tokens_as_the_picture() -> None:
    """The number of keys does not tell the two calls apart: 56 cells, and 14 images of 4 tokens."""
    tiny = flux()
    rows, columns = 7, 8
    tiny.inputs |= {
        "hidden_states": draw(2, rows * columns, 4),
        "img_ids": picture_ids(rows, columns),
        "joint_attention_kwargs": {"ip_adapter_image_embeds": [draw(2, 14, FEATURES)]},
    }
    pipe = tiny_pipelines.flux().pipe
    pipe.transformer = tiny.model
    layouts = {key: (Tokens(tokens.before, 1, rows, columns),) for key, (tokens,) in tiny.spatial.items()}
    pipe.load_ip_adapter(flux_weights(pipe), "", image_encoder_pretrained_model_name_or_path=None)
    want = under_masks(tiny.run, (tiny.model, layouts), prompts=True)
    diffattn.apply(tiny.model, "clear", radius=RADIUS)
    assert error(tiny.run(), want) < TOLERANCE


@works
@families
def test_restore_after_an_adapter_was_loaded(family: str) -> None:
    """The loader builds processors anew by their class, which was ours: none is left behind."""
    reference, case = prompted(family), prompted(family)
    reference.on()
    want = reference.run()
    case.apply()
    case.on()
    diffattn.restore(case.target)
    assert torch.equal(case.run(), want)
    ((model, _),) = case.layouts
    names = {type(processor).__name__ for processor in model.attn_processors.values()}
    assert not [name for name in names if name.startswith("Clear")]
