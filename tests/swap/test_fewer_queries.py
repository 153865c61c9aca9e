"""Swapped layers in calls with fewer queries than keys, and in sequences of several grids."""

from typing import Any

import diffusers
import pytest
import torch
from further import rectangular
from hand_masks import RADIUS, TOLERANCE, by_hand, error, gradients, relative
from models import BUILDERS, COLUMNS, ROWS, TEXT, Tokens, draw, flux, picture_ids
from releases import built
from tiny_pipelines import tiny_vae
from torch import Tensor

import diffattn
from diffattn.families import arguments, family_of
from diffattn.swap.calls.records import SWAPPED
from diffattn.swap.helpers import attending_helpers

FEWER = ["PRX", "NucleusMoE", "Stable-Cascade", "Cosmos3", "UNet-added-keys", "GLM-Image-edit", "Flux2-cached"]
fewer = pytest.mark.parametrize("name", built(FEWER))


@torch.no_grad()
@fewer
def test_calls_are_counted_with_what_they_cost(name: str) -> None:
    """Queries times keys, not keys squared; the text's own causal call is none of the layer's."""
    tiny = BUILDERS[name]()
    with diffattn.apply(tiny.model, "clear", radius=RADIUS) as handle:
        tiny.run()
        told = diffattn.summary(tiny.model)
        assert told.calls == {SWAPPED: len(handle.layers)}
        for layer in handle.layers:
            assert layer.last is not None and layer.grid is not None
            assert layer.last.query.shape[2] == layer.grid.queries < layer.last.keys == layer.grid.tokens
            heads, size = layer.last.query.shape[1], layer.last.query.shape[3]
            assert layer.flops(diffattn.SoftmaxAttention()) == 4 * layer.grid.pairs * heads * size
        assert told.share is not None and told.share < 1


@pytest.mark.parametrize("name", built(["PRX", "Cosmos3"]))
@pytest.mark.slow
def test_compiled_with_gradients(name: str) -> None:
    """The operator finds queries and keys of the call, and its backward pass has them again."""
    tiny = BUILDERS[name]()
    want = gradients(tiny.model, by_hand(tiny, tiny.spatial))
    diffattn.apply(tiny.model, "clear", radius=RADIUS)
    compiled = torch.compile(tiny.model, backend="aot_eager")
    assert relative(gradients(tiny.model, tiny.run(compiled)), want) < TOLERANCE
    torch._dynamo.reset()


@torch.no_grad()
@pytest.mark.parametrize("name", built(["GLM-Image-edit", "Flux2-cached", "Flux2-extract", "Qwen-Image-Layered"]))
@pytest.mark.slow
def test_compiled_forward(name: str) -> None:
    tiny = BUILDERS[name]()
    want = by_hand(tiny, tiny.spatial)
    diffattn.apply(tiny.model, "clear", radius=RADIUS)
    assert error(tiny.run(torch.compile(tiny.model, backend="eager")), want) < TOLERANCE
    torch._dynamo.reset()


@pytest.mark.slow
def test_a_compiled_backward_pass_of_several_grids_is_refused() -> None:
    tiny = BUILDERS["VisualCloze"]()
    diffattn.apply(tiny.model, "clear", radius=RADIUS)
    with pytest.raises(NotImplementedError, match="no backward pass where a sequence holds several grids"):
        gradients(tiny.model, tiny.run(torch.compile(tiny.model, backend="aot_eager")))
    torch._dynamo.reset()


@torch.no_grad()
def test_references_see_themselves_alone_when_their_keys_are_kept() -> None:
    """The step that keeps them, those that read them, and a call without any, by one swap."""
    extract, cached, plain = (BUILDERS[name]() for name in ("Flux2-extract", "Flux2-cached", "Flux2"))
    model = extract.model
    cases = [extract, cached, plain]
    wanted = [by_hand(tiny, tiny.spatial) for tiny in cases]
    with diffattn.apply(model, "clear", radius=RADIUS) as handle:
        for tiny, want in zip(cases, wanted, strict=True):
            assert error(tiny.run(model), want) < TOLERANCE
            assert diffattn.summary(model).calls == {SWAPPED: len(handle.layers)}
    assert torch.equal(extract.run(), extract.run(BUILDERS["Flux2-extract"]().model))


def test_the_helper_of_klein_is_the_one_that_is_known() -> None:
    from diffusers.models.transformers import transformer_flux2

    for name in ("Flux2KVAttnProcessor", "Flux2KVParallelSelfAttnProcessor"):
        call: Any = getattr(transformer_flux2, name).__call__
        assert [*attending_helpers(call)] == ["_flux2_kv_causal_attention"]
    assert not attending_helpers(transformer_flux2.Flux2AttnProcessor.__call__)


def rows_of_images(*sizes: tuple[int, int]) -> Tensor:
    """The ids that VisualCloze gives: rows of examples numbered from 1, the last with the image that is made."""
    rows = [picture_ids(*size) for size in sizes]
    for number, row in enumerate(rows, start=1):
        row[:, 0] = number
    return torch.cat(rows)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_examples_of_other_sizes(dtype: torch.dtype) -> None:
    """What is made is last; ids come in the prompt's dtype."""
    tiny = flux()
    ids = rows_of_images((ROWS, COLUMNS), (4, 5), (3, 8)).to(dtype)
    call = dict(hidden_states=draw(2, len(ids), 4), img_ids=ids)
    examples = ((TEXT, 1, ROWS, COLUMNS), (TEXT + 54, 1, 4, 5))
    layouts = dict.fromkeys(tiny.spatial, (Tokens(TEXT + 74, 1, 3, 8, further=examples),))
    want = by_hand(tiny, layouts, **call)
    assert error(want, tiny.run(**call)) > 1e-3
    for name in ("VisualClozePipeline", "VisualClozeGenerationPipeline"):
        scheduler, vae = diffusers.FlowMatchEulerDiscreteScheduler(), tiny_vae(latent_channels=1)
        pipe = getattr(diffusers, name)(scheduler, vae, None, None, None, None, tiny.model)
        with diffattn.apply(pipe, "clear", radius=RADIUS):
            assert error(tiny.run(**call), want) < TOLERANCE
    with diffattn.apply(tiny.model, "clear", radius=RADIUS):
        one = rows_of_images((ROWS, COLUMNS)).to(dtype)  # no examples
        assert error(tiny.run(img_ids=one), by_hand(flux(), tiny.spatial, img_ids=one)) < TOLERANCE


@torch.no_grad()
def test_layers_cost_less_where_they_are_frames() -> None:
    """To `clear` the layers see each other exactly; `routing` chooses among the tiles of all."""
    tiny = BUILDERS["Qwen-Image-Layered"]()
    shares = {}
    for mechanism in ("clear", "routing"):
        options: dict[str, Any] = {"radius": 2} if mechanism == "clear" else {"top_k": 1, "tile": 3}
        with diffattn.apply(tiny.model, mechanism, **options):
            tiny.run()
            shares[mechanism] = diffattn.summary(tiny.model).share
    assert shares["routing"] < shares["clear"] < 1


@torch.no_grad()
def test_layered_pipelines_are_taken() -> None:
    tiny = BUILDERS["Qwen-Image-Layered"]()
    want = by_hand(tiny, tiny.spatial)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    pipe = diffusers.QwenImageLayeredPipeline(scheduler, None, None, None, None, tiny.model)
    with diffattn.apply(pipe, "clear", radius=RADIUS):
        assert error(tiny.run(), want) < TOLERANCE


@torch.no_grad()
def test_more_silent_tokens_than_others_is_an_error() -> None:
    layout = diffattn.families.Layout(3, 4)
    assert layout.grid(17, 12).silent == (5, 0)
    assert layout.grid(17, 14).silent == (3, 0)
    assert diffattn.families.Layout(3, 4, before=2, after=None).grid(17, 12).silent == (2, 3)
    with pytest.raises(ValueError, match=r"the layer has 11 queries, and the model was called for a grid of 1 x 3 x 4"):
        layout.grid(17, 11)


@torch.no_grad()
def test_several_videos_in_one_sequence_are_refused() -> None:
    tiny = BUILDERS["Cosmos3"]()
    shape = tiny.inputs["vision_token_shapes"]
    call = arguments(tiny.model, (), {**tiny.inputs, "vision_token_shapes": shape * 2})
    with pytest.raises(NotImplementedError, match="the sequence holds 2 videos"):
        family_of(tiny.model).layers[0].read(tiny.model, call)


@torch.no_grad()
def test_blocks_that_attend_to_conditions_alone_are_kept() -> None:
    tiny = BUILDERS["Stable-Cascade"]()
    blocks = [module for module in tiny.model.modules() if type(module).__name__ == "SDCascadeAttnBlock"]
    blocks[0].self_attn = False
    with diffattn.apply(tiny.model, "clear", radius=RADIUS) as handle:
        tiny.run()
        assert len(handle.layers) == len(blocks) - 1
        assert "not a self-attention" in str(diffattn.summary(tiny.model))


@torch.no_grad()
def test_blocks_of_the_latent_upscaler() -> None:
    """Their first attention sees the features, the second the text."""
    tiny = rectangular.unet_upscaler()
    own, want = tiny.run(), by_hand(tiny, tiny.spatial)
    with diffattn.apply(tiny.model, "clear", radius=RADIUS) as handle:
        assert error(tiny.run(), want) < TOLERANCE
        assert len(handle.layers) == 8 and all(layer.reached for layer in handle.layers)
    assert error(want, own) > 1e-3 and torch.equal(tiny.run(), own)
