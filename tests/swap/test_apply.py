"""The public calls: apply, restore, summary, attn_processors; what they refuse; and models that change under them."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor
from models import Tiny, flux, flux_controlnet, sd15, sd35, wan

import diffattn
from diffattn import ClearAttention, TokenGrid
from diffattn.swap.calls import frames


def own_processors(model: Any) -> dict[str, Any]:
    return {name: module.processor for name, module in model.named_modules() if hasattr(module, "processor")}


@pytest.fixture
def tiny() -> Tiny:
    return flux()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mechanism": "claer"}, "unknown mechanism 'claer'; known: .*clear.* Did you mean 'clear'"),
        ({"mechanism": "clear", "radios": 3}, "clear has no option 'radios'; .* Did you mean 'radius'"),
        ({"mechanism": "clear"}, "clear needs radius"),
        ({"mechanism": "clear", "radius": 0}, "radius must be a positive number, got 0"),
        ({"mechanism": "clear", "radius": -4}, "radius must be a positive number, got -4"),
        ({"mechanism": "clear", "radius": 2, "down_factor": 1}, "down_factor must be None or an int of at least 2"),
        ({"mechanism": ClearAttention(radius=2), "radius": 3}, "go with a short name"),
        ({"mechanism": "clear", "radius": 2, "layers": "blocks.*"}, "matches none of 4 layers, such as transformer"),
        ({"mechanism": "clear", "radius": 2, "layers": ["*", "typo"]}, "layers='typo' matches none"),
        ({"mechanism": "clear", "radius": 2, "layers": lambda name: False}, "picks none of 4 layers"),
        ({"mechanism": "clear", "radius": 2, "components": ["unet"]}, "components= names parts of a pipeline"),
        ({"mechanism": "clear", "radius": 2, "backend": "warp"}, "warp"),
    ],
)  # fmt: skip
def test_bad_input_changes_nothing(tiny: Tiny, arguments: dict[str, Any], message: str) -> None:
    processors, hooks = own_processors(tiny.model), len(tiny.model._forward_pre_hooks)
    with pytest.raises(ValueError, match=message):
        diffattn.apply(tiny.model, **arguments)
    assert own_processors(tiny.model) == processors
    assert len(tiny.model._forward_pre_hooks) == hooks
    assert not hasattr(tiny.model, "_diffattn")


def test_targets_that_cannot_be_swapped() -> None:
    with pytest.raises(TypeError, match="expected a diffusers pipeline or model, got dict"):
        diffattn.apply({}, "clear", radius=2)
    with pytest.raises(ValueError, match="Linear belongs to no known model family; known: .*FluxTransformer2DModel"):
        diffattn.apply(torch.nn.Linear(2, 2), "clear", radius=2)
    with pytest.raises(TypeError, match="mechanism must be a short name or a config"):
        diffattn.apply(flux().model, 16)  # type: ignore[arg-type]


def test_restore_without_apply(tiny: Tiny) -> None:
    with pytest.raises(ValueError, match="nothing to restore"):
        diffattn.restore(tiny.model)
    handle = diffattn.apply(tiny.model, "clear", radius=2)
    handle.restore()
    with pytest.raises(ValueError, match="no longer in place"):
        handle.restore()
    with pytest.raises(ValueError, match="nothing to restore"):
        diffattn.restore(tiny.model)


def test_a_second_apply_replaces_the_first(tiny: Tiny) -> None:
    plain, processors = tiny.run(), own_processors(tiny.model)
    first = diffattn.apply(tiny.model, "clear", radius=2)
    two = tiny.run()
    second = diffattn.apply(tiny.model, "clear", radius=4, ntk_factor=2)
    four = tiny.run()
    assert not torch.equal(two, four)
    with pytest.raises(ValueError, match="no longer in place"):
        first.restore()
    diffattn.apply(tiny.model, "clear", radius=2)
    assert torch.equal(tiny.run(), two)
    with pytest.raises(ValueError):
        second.restore()
    diffattn.restore(tiny.model)
    assert torch.equal(tiny.run(), plain)
    assert own_processors(tiny.model) == processors


def test_with_block_restores_also_after_an_error(tiny: Tiny) -> None:
    processors = own_processors(tiny.model)
    with pytest.raises(ZeroDivisionError), diffattn.apply(tiny.model, "clear", radius=2):
        assert type(tiny.model.transformer_blocks[0].attn.processor).__name__ == "ClearFluxAttnProcessor"
        raise ZeroDivisionError
    assert own_processors(tiny.model) == processors
    with diffattn.apply(tiny.model, "clear", radius=2) as handle:
        handle.restore()
    assert own_processors(tiny.model) == processors


def test_layers_by_glob_and_predicate(tiny: Tiny) -> None:
    single = diffattn.apply(tiny.model, "clear", radius=2, layers="single_transformer_blocks.*")
    assert [layer.name for layer in single.layers] == [
        "single_transformer_blocks.0.attn",
        "single_transformer_blocks.1.attn",
    ]
    picked = diffattn.apply(tiny.model, "clear", radius=2, layers=lambda name: name.endswith("1.attn"))
    assert [layer.name for layer in picked.layers] == ["transformer_blocks.1.attn", "single_transformer_blocks.1.attn"]


def test_min_tokens_leaves_small_calls_alone(tiny: Tiny) -> None:
    plain = tiny.run()
    diffattn.apply(tiny.model, "clear", radius=2, min_tokens=60)
    assert torch.equal(tiny.run(), plain)  # 59 tokens
    diffattn.apply(tiny.model, "clear", radius=2, min_tokens=59)
    assert not torch.allclose(tiny.run(), plain, atol=1e-3)


def test_ntk_factor_needs_a_live_rotary_embedding(tiny: Tiny) -> None:
    theta = tiny.model.pos_embed.theta
    with diffattn.apply(tiny.model, "clear", radius=2, ntk_factor=10):
        assert tiny.model.pos_embed.theta == 10 * theta
    assert tiny.model.pos_embed.theta == theta
    with pytest.raises(ValueError, match="ntk_factor scales a rotary embedding .* Wan does not have"):
        diffattn.apply(wan().model, "clear", radius=2, ntk_factor=10)


def test_grid_errors_come_at_the_call(tiny: Tiny) -> None:
    diffattn.apply(tiny.model, "clear", radius=2, down_factor=4)
    with pytest.raises(ValueError, match="down_factor=4 does not divide the grid of 6 rows and 9 columns"):
        tiny.run()
    diffattn.apply(tiny.model, "clear", radius=2)
    with pytest.raises(ValueError, match="img_ids must list an image of 6 x 9 tokens row by row"):
        tiny.run(img_ids=tiny.inputs["img_ids"].flip(0))
    short = {**tiny.inputs, "hidden_states": tiny.inputs["hidden_states"][:, :30], "img_ids": tiny.inputs["img_ids"]}
    with pytest.raises((ValueError, RuntimeError)):
        tiny.model(**short)


def test_a_layer_called_outside_its_model(tiny: Tiny) -> None:
    diffattn.apply(tiny.model, "clear", radius=2)
    attention = tiny.model.single_transformer_blocks[0].attn
    with pytest.raises(RuntimeError, match="called outside its model"):
        attention(torch.randn(1, 59, attention.query_dim))


def test_summary_tells_swapped_from_kept(tiny: Tiny) -> None:
    text = str(diffattn.summary(tiny.model))
    assert "0 of 4 attention layers are swapped" in text
    diffattn.apply(tiny.model, "clear", radius=2, layers="single*")
    before = diffattn.summary(tiny.model)
    assert before.share is None and "known after the first call" in str(before)
    tiny.run()
    after = diffattn.summary(tiny.model)
    assert [(row.layer, row.swapped) for row in after.rows] == [
        ("transformer_blocks.0.attn", False),
        ("transformer_blocks.1.attn", False),
        ("single_transformer_blocks.0.attn", True),
        ("single_transformer_blocks.1.attn", True),
    ]
    grid = TokenGrid(6, 9, before=5)
    mechanism = ClearAttention(radius=2)
    assert after.rows[2].grid == grid
    assert after.rows[2].flops_before == 4 * 59**2 * 32
    assert after.rows[2].flops_after == 4 * int(mechanism.mask(grid).sum()) * 32
    assert after.rows[0].note == "left out by layers="
    text = str(after)
    assert "single_transformer_blocks.{0..1}.attn" in text and "5+6x9" in text and "clear(radius=2)" in text
    assert "2 of 4 attention layers are swapped" in text


def test_summary_of_cross_attention_and_replaced_layers() -> None:
    tiny = sd15()
    diffattn.apply(tiny.model, "clear", radius=2)
    notes = {row.layer: row.note for row in diffattn.summary(tiny.model).rows if not row.swapped}
    assert all(name.endswith("attn2") for name in notes)
    assert set(notes.values()) == {"not a self-attention over the grid"}


def test_the_swap_goes_on_over_new_processors(tiny: Tiny, caplog: pytest.LogCaptureFixture) -> None:
    plain = tiny.run()
    diffattn.apply(tiny.model, "clear", radius=2)
    want = tiny.run()
    theirs = FluxAttnProcessor()
    tiny.model.transformer_blocks[0].attn.set_processor(theirs)
    with caplog.at_level(logging.WARNING, logger="diffattn"):
        assert torch.equal(tiny.run(), want)
        assert torch.equal(tiny.run(), want)
    assert caplog.text.count("FluxAttnProcessor was set on layers of a swapped FluxTransformer2DModel") == 1
    assert diffattn.summary(tiny.model).rows[0].swapped
    diffattn.restore(tiny.model)
    assert tiny.model.transformer_blocks[0].attn.processor is theirs
    assert torch.equal(tiny.run(), plain)


class Around:
    """Somebody's processor around ours."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner(*args, **kwargs)


def test_a_processor_around_ours_is_nothing_to_warn_of(tiny: Tiny, caplog: pytest.LogCaptureFixture) -> None:
    diffattn.apply(tiny.model, "clear", radius=2)
    want = tiny.run()
    attention = tiny.model.single_transformer_blocks[0].attn
    ours = attention.processor
    attention.processor = Around(ours)
    attention.forward = lambda hidden_states, **kwargs: attention.processor(attention, hidden_states, **kwargs)
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="diffattn"):
        assert torch.equal(tiny.run(), want)
    assert not caplog.text
    attention.processor = ours
    diffattn.restore(tiny.model)


class OfAnotherKind:
    """A processor that makes neither of the two attention calls."""

    def __call__(self, attn: Any, hidden_states: Any, encoder_hidden_states: Any, *_: Any, **__: Any) -> Any:
        return hidden_states, encoder_hidden_states


def test_processors_without_an_exit_are_noticed_and_left_alone(tiny: Tiny, caplog: pytest.LogCaptureFixture) -> None:
    diffattn.apply(tiny.model, "clear", radius=2)
    theirs = OfAnotherKind()
    tiny.model.transformer_blocks[0].attn.set_processor(theirs)
    with caplog.at_level(logging.WARNING, logger="diffattn"):
        tiny.run()
        tiny.run()
    assert caplog.text.count("1 of 4 swapped layers were replaced by OfAnotherKind and compute") == 1
    assert caplog.text.count("call diffattn.apply again") == 1
    row = diffattn.summary(tiny.model).rows[0]
    assert not row.swapped and row.note == "replaced by OfAnotherKind since"
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="diffattn"):
        diffattn.restore(tiny.model)
    assert "transformer_blocks.0.attn carries OfAnotherKind now: left as it is" in caplog.text
    assert tiny.model.transformer_blocks[0].attn.processor is theirs


def test_the_users_attention_backend_survives(tiny: Tiny) -> None:
    diffattn.apply(tiny.model, "clear", radius=2)
    tiny.model.set_attention_backend("_native_math")
    diffattn.restore(tiny.model)
    assert {processor._attention_backend for processor in own_processors(tiny.model).values()} == {"_native_math"}
    tiny.model.reset_attention_backend()


def test_attn_processors_goes_diffusers_own_way(tiny: Tiny) -> None:
    plain, processors = tiny.run(), own_processors(tiny.model)
    with diffattn.apply(tiny.model, "clear", radius=2, layers="single*"):
        wanted = tiny.run()
    swapped = diffattn.attn_processors(tiny.model, ClearAttention(radius=2), layers="single*")
    assert swapped.keys() == tiny.model.attn_processors.keys()
    assert torch.equal(tiny.run(), plain)  # nothing is set yet
    tiny.model.set_attn_processor(swapped)
    assert torch.equal(tiny.run(), wanted)
    diffattn.restore(tiny.model)
    assert own_processors(tiny.model) == processors


def flux_pipeline(**parts: Any) -> FluxPipeline:
    return FluxPipeline(FlowMatchEulerDiscreteScheduler(), None, None, None, None, None, flux().model, **parts)


def test_pipelines_and_their_parts() -> None:
    pipe = flux_pipeline()
    handle = diffattn.apply(pipe, "clear", radius=2)
    assert repr(handle) == "<Handle clear(radius=2): 4 layers of FluxTransformer2DModel>"
    assert diffattn.summary(pipe).rows[0].swapped
    diffattn.restore(pipe)
    with pytest.raises(ValueError, match="FluxPipeline has no model 'unet'; its models: transformer"):
        diffattn.apply(pipe, "clear", radius=2, components=["unet"])

    class Scheduled:
        components = {"scheduler": DDPMScheduler()}  # noqa: RUF012

    with pytest.raises(
        ValueError, match="has none of unet, transformer, transformer_2, .*; name its model by components="
    ):
        diffattn.apply(Scheduled(), "clear", radius=2)


def test_other_parts_only_by_name() -> None:
    class WithControl:
        def __init__(self) -> None:
            self.components = {"transformer": flux().model, "controlnet": flux_controlnet().model}

    pipe = WithControl()
    assert len(diffattn.apply(pipe, "clear", radius=2).layers) == 4
    assert not hasattr(pipe.components["controlnet"], "_diffattn")
    diffattn.restore(pipe)
    handle = diffattn.apply(pipe, "clear", radius=2, components=("controlnet",))
    assert {swap for layer in handle.layers for swap in [layer.name.partition(".")[0]]} == {
        "transformer_blocks",
        "single_transformer_blocks",
    }
    assert not hasattr(pipe.components["transformer"], "_diffattn")
    diffattn.restore(pipe)
    assert not hasattr(pipe.components["controlnet"], "_diffattn")


@pytest.mark.parametrize("build", [flux, sd35, wan, sd15])
def test_save_pretrained_writes_the_unswapped_model(build: Callable[[], Tiny], tmp_path: Path) -> None:
    tiny = build()
    plain = tiny.run()
    diffattn.apply(tiny.model, "clear", radius=2, down_factor=2 if build is sd35 else None)
    tiny.model.save_pretrained(tmp_path)
    again, info = type(tiny.model).from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert torch.equal(tiny.run(again.eval()), plain)
    diffattn.restore(tiny.model)
    assert torch.equal(tiny.run(), plain)


def test_several_resolutions_in_one_process(tiny: Tiny) -> None:
    diffattn.apply(tiny.model, "clear", radius=3)
    first = tiny.run()
    ids = tiny.inputs["img_ids"][:, [0, 2, 1]]  # 9 rows of 6: as many tokens
    order = torch.arange(54).view(6, 9).T.flatten()
    turned = tiny.run(img_ids=ids[order], hidden_states=tiny.inputs["hidden_states"][:, order])
    assert not torch.equal(first, turned)
    small = tiny.run(img_ids=tiny.inputs["img_ids"][:9], hidden_states=tiny.inputs["hidden_states"][:, :9])
    assert small.numel() == first.numel() // 6
    assert torch.equal(tiny.run(), first)


def test_a_model_that_no_longer_comes_to_its_exit(tiny: Tiny) -> None:
    model: FluxTransformer2DModel = tiny.model  # type: ignore[assignment]
    diffattn.apply(model, "clear", radius=2)
    for processor in own_processors(model).values():
        processor.layer.wants = lambda *_: False  # as if the family's processor called something else
    with pytest.raises(RuntimeError, match="none of its 4 swapped layers came to an attention call"):
        tiny.run()


def test_an_untrained_swap_says_so_once(tiny: Tiny, caplog: pytest.LogCaptureFixture) -> None:
    from diffattn.swap.apply import _say_untrained

    _say_untrained.cache_clear()
    with caplog.at_level(logging.WARNING, logger="diffattn"):
        diffattn.apply(tiny.model, "softmax")
        assert not caplog.text
        diffattn.apply(tiny.model, "clear", radius=2)
        diffattn.apply(tiny.model, "clear", radius=3)
    assert caplog.text.count("clear takes the place of the attention that the model was trained with") == 1


def features_of(layer: Any) -> Any:
    frame = frames.find(layer.scope)
    return frame and frame.call.features.get(layer.index)


def test_a_dense_step_keeps_no_block_input() -> None:
    pipe = flux_pipeline()
    pipe.scheduler.set_timesteps(4)
    handle = diffattn.apply(pipe, "agent", agents="merge", steps=slice(1, None))
    blocks = [pipe.transformer.get_submodule(layer.name.rpartition(".")[0]) for layer in handle.layers]
    kept: list[bool] = []
    for layer, block in zip(handle.layers, blocks, strict=True):
        block.register_forward_pre_hook(lambda *_, layer=layer: kept.append(features_of(layer) is not None))
    for timestep in pipe.scheduler.timesteps[:2]:
        pipe.transformer(**{**flux().inputs, "timestep": timestep.expand(2)})
        pipe.scheduler.step(torch.zeros(1), timestep, torch.zeros(1))
    assert kept == [False] * len(blocks) + [True] * len(blocks)


def test_a_pause_is_the_models_own_attention_and_rotary_base() -> None:
    case = flux()
    before = case.run()
    with diffattn.apply(case.model, "clear", radius=1.5, ntk_factor=10) as handle:
        swapped = case.run()
        with handle.paused():
            assert torch.equal(case.run(), before)
        assert torch.equal(case.run(), swapped)
        with pytest.raises(KeyError), handle.paused():
            raise KeyError
        assert torch.equal(case.run(), swapped)
    assert not torch.allclose(swapped, before, atol=1e-3)
