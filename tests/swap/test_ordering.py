"""Tokens ordered once give what ordering in every layer gives; where they are not, the summary says why."""

from collections.abc import Callable
from typing import Any

import models
import pytest
import torch
from models import COLUMNS, ROWS, Tiny, draw
from torch import Tensor
from torch.nn.attention import flex_attention

import diffattn
from diffattn import ClearAttention, HaloAttention, LinearAttention, NeighborhoodAttention
from diffattn.kernels import choose, flex
from diffattn.kernels.order import TileOrder
from diffattn.swap.apply import swaps_of
from diffattn.swap.ordering import ONCE

STRIPS = HaloAttention(tile=(ROWS, 3), halo=(0, 1))
"""Tiles that divide the grid of the tiny models, in another order than row by row."""


def with_residuals() -> Tiny:
    tiny = models.flux()
    cells = ROWS * COLUMNS
    tiny.inputs["controlnet_block_samples"] = [draw(2, cells, 32), draw(2, cells, 32) + 1]
    tiny.inputs["controlnet_single_block_samples"] = [draw(2, cells, 32) - 1]
    return tiny


def sd3_with_residuals() -> Tiny:
    tiny = models.sd35()
    width = tiny.model.config.num_attention_heads * tiny.model.config.attention_head_dim
    tiny.inputs["block_controlnet_hidden_states"] = [draw(2, ROWS * COLUMNS, width)]
    return tiny


def qwen_of_one_length() -> Tiny:
    tiny = models.qwen_image_edit()
    tiny.inputs["encoder_hidden_states_mask"] = None
    return tiny


FAMILIES: list[Callable[[], Tiny]] = [
    models.flux, models.flux_kontext, with_residuals, models.flux2, models.sd3, sd3_with_residuals, qwen_of_one_length,
    models.wan, models.ltx,
]  # fmt: skip


@pytest.fixture(autouse=True)
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel's own sums without a compiler."""
    monkeypatch.setattr(flex_attention, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    monkeypatch.setattr(flex, "_compiled", lambda *key: flex._kernel)
    monkeypatch.setattr(choose, "missing_compiler", lambda device: None)


@pytest.fixture
def orders(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Number of tokens of every change of order."""
    found: list[int] = []
    to_tiles = TileOrder.to_tiles

    def note(self: TileOrder, cells: Tensor, *rest: Any) -> Tensor:
        found.append(cells.shape[-1])
        return to_tiles(self, cells, *rest)

    monkeypatch.setattr(TileOrder, "to_tiles", note)
    return found


def told(model: Any) -> str:
    (found,) = diffattn.summary(model).orders.values()
    return found


def in_layers(tiny: Tiny, **changes: Any) -> Tensor:
    """The output with the order in every layer."""
    (swap,) = swaps_of(tiny.model)
    assert swap.ordering is not None
    swap.ordering.remove()
    return tiny.run(**changes)


@pytest.mark.parametrize("make", FAMILIES, ids=lambda make: make.__name__)
@torch.no_grad()
def test_once_equals_every_layer(make: Callable[[], Tiny], orders: list[int]) -> None:
    tiny = make()
    plain = tiny.run()
    video = make in (models.wan, models.ltx)
    diffattn.apply(tiny.model, HaloAttention(tile=(3, 2, 5), halo=0) if video else STRIPS, backend="flex")
    once = tiny.run()
    assert told(tiny.model) == ONCE
    assert set(orders) <= {1}, "a layer ordered its tokens"
    want = in_layers(tiny)
    assert max(orders) > 1
    assert (once - want).abs().max() < 1e-5
    assert (once - plain).abs().max() > 1e-3
    diffattn.restore(tiny.model)
    assert torch.equal(tiny.run(), plain)


@torch.no_grad()
def test_two_resolutions_have_an_order_each() -> None:
    tiny = models.flux()
    large = {"hidden_states": draw(2, 12 * COLUMNS, 4), "img_ids": models.picture_ids(12, COLUMNS)}
    diffattn.apply(tiny.model, STRIPS, backend="flex")
    found = [tiny.run(), tiny.run(**large), tiny.run()]
    assert told(tiny.model) == ONCE
    assert torch.equal(found[0], found[2])
    assert (found[0] - in_layers(tiny)).abs().max() < 1e-5
    assert (found[1] - tiny.run(**large)).abs().max() < 1e-5


@torch.no_grad()
def test_layers_that_keep_their_own_attention_take_the_order_too() -> None:
    tiny = models.flux()
    diffattn.apply(
        tiny.model, STRIPS, backend="flex", layers=["transformer_blocks.0.attn", "single_transformer_blocks.1.attn"]
    )
    once = tiny.run()
    assert told(tiny.model) == ONCE
    assert (once - in_layers(tiny)).abs().max() < 1e-5


@torch.no_grad()
def test_a_kernel_that_refuses_a_call_gets_its_cells_row_by_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """Should a layer not take the order after all, it is undone for it."""
    tiny = models.flux()
    diffattn.apply(tiny.model, STRIPS, backend="flex")
    once = tiny.run()
    monkeypatch.setattr(choose, "takes_order", lambda call: False)
    assert (once - tiny.run()).abs().max() < 1e-5


WHY: dict[str, tuple[Any, dict[str, Any], str]] = {
    "ragged": (HaloAttention(tile=(4, 5), halo=1), {}, "don't divide the grid"),
    "tiles": (HaloAttention(tile=(ROWS, 3), halo=1), {"backend": "tiled"}, "a kernel that needs none"),
    "dilated": (NeighborhoodAttention(kernel_size=3, dilation=2), {"backend": "flex"}, "a kernel that needs none"),
    "pool": (HaloAttention(tile=3, halo=1, pool=3), {}, "a kernel that needs none"),
    "pooled keys": (ClearAttention(radius=2, down_factor=3), {"backend": "flex"}, "a kernel that needs none"),
}


@pytest.mark.parametrize("case", WHY)
@torch.no_grad()
def test_why_layers_order_their_own_tokens(case: str) -> None:
    mechanism, options, words = WHY[case]
    tiny = models.flux()
    diffattn.apply(tiny.model, mechanism, **({"backend": "flex"} if case == "ragged" else options))
    tiny.run()
    assert words in told(tiny.model)
    assert "in every layer" in str(diffattn.summary(tiny.model))


@torch.no_grad()
def test_models_whose_row_does_not_say_how_order_in_their_layers() -> None:
    tiny = models.pixart()
    diffattn.apply(tiny.model, ClearAttention(radius=2))
    assert diffattn.summary(tiny.model).orders == {}
    tiny.run()
    assert "it is not known where tokens enter" in told(tiny.model)


def test_with_gradients_every_layer_orders_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = models.flux()
    diffattn.apply(tiny.model, STRIPS)
    tiny.run().sum().backward()
    assert "gradients are computed" in told(tiny.model)


@torch.no_grad()
def test_what_tells_tokens_apart_is_heeded() -> None:
    tiny = models.flux()
    diffattn.apply(tiny.model, STRIPS, backend="flex")
    tiny.run(joint_attention_kwargs={"scale": 1.0})
    assert told(tiny.model) == ONCE
    swap = swaps_of(tiny.model)[0]
    assert swap.ordering is not None
    refuses = swap.ordering._path.refuses
    assert "ip_adapter_masks" in str(refuses({"joint_attention_kwargs": {"ip_adapter_masks": [0]}}))
    assert "references" in str(refuses({"kv_cache_mode": "cached"}))
    padded = torch.tensor([[True, False]])
    qwen = diffattn.families.family_of(models.qwen_image().model)
    assert "padded" in str(qwen.tokens.refuses({"encoder_hidden_states_mask": padded}))
    wan = diffattn.families.family_of(models.wan().model)
    assert "own timestep" in str(wan.tokens.refuses({"timestep": torch.zeros(1, 8)}))


@torch.no_grad()
def test_several_mechanisms_have_several_orders() -> None:
    tiny = models.flux()
    kinds = {"transformer_blocks.*": STRIPS, "single_transformer_blocks.*": LinearAttention()}
    diffattn.apply(tiny.model, kinds)
    assert diffattn.summary(tiny.model).orders == {}
    tiny.run()
    assert diffattn.summary(tiny.model).orders == {}


@torch.no_grad()
def test_a_copy_orders_its_own_tokens() -> None:
    import copy

    tiny = models.flux()
    diffattn.apply(tiny.model, STRIPS, backend="flex")
    other = copy.deepcopy(tiny.model)
    once = tiny.run(other)
    assert told(other) == ONCE
    diffattn.restore(tiny.model)
    assert torch.equal(tiny.run(other), once)


@torch.no_grad()
@pytest.mark.slow
def test_a_pipeline_with_guidance_dense_steps_and_reuse() -> None:
    from diffusers import FluxPipeline

    pipe = FluxPipeline.from_pretrained(diffattn.tiny.path("flux"))
    pipe.set_progress_bar_config(disable=True)

    def image() -> Tensor:
        found: Tensor = pipe(
            "a red circle on blue", negative_prompt="a square", true_cfg_scale=2.0, height=64, width=64,
            num_inference_steps=4, output_type="pt", generator=torch.Generator().manual_seed(0),
        ).images  # fmt: skip
        return found

    diffattn.apply(pipe, ClearAttention(radius=3), backend="flex", steps=slice(1, None), reuse=2)
    once = image()
    assert told(pipe) == ONCE
    assert diffattn.summary(pipe).calls["dense in steps that steps= leaves out"]
    (swap,) = swaps_of(pipe)
    assert swap.ordering is not None
    swap.ordering.remove()
    assert (image() - once).abs().max() < 1e-5
