"""Every model family: the swap computes what it says, and can be undone.

Nothing here trusts the library's own masks: `hand_masks` lays others over the calls of the untouched model.
"""

import copy
import functools
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import diffusers.hooks._helpers
import diffusers.models.controlnets
import pytest
import torch
from hand_masks import RADIUS, TOLERANCE, by_hand, error, gradients, relative
from models import BUILDERS, TEXT, Tiny, Tokens, draw, flux, picture_ids, sana
from releases import built, needs
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import diffattn
from diffattn import config
from diffattn.families import Layout, arguments, family_of, find_layers
from diffattn.mechanisms import Context, Mechanism
from scripts import support_table

pytestmark = pytest.mark.filterwarnings("ignore:In CPU autocast:UserWarning")


@dataclass(frozen=True, kw_only=True)
class PlainAttention(Mechanism):
    """Exact attention that does not hand the call back to the model: proves the interception itself."""

    type: ClassVar[str] = "plain"
    kinds: ClassVar[frozenset[str]] = frozenset({"spatial", "temporal"})

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        grid: diffattn.TokenGrid,
        *,
        scale: float | None = None,
        backend: str = "auto",
        context: Context = Context(),
    ) -> Tensor:
        grid.check(q, k)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=context.mask, scale=scale)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small spend nearly all their time waiting for a second thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", autouse=True)
def plain() -> Iterator[None]:
    """Register `plain` for this module's tests only."""
    config.register("plain")(PlainAttention)
    yield
    del config._registry["plain"]


@functools.cache
def build(name: str) -> Tiny:
    return BUILDERS[name]()


@functools.cache
def own_output(name: str) -> Tensor:
    with torch.no_grad():
        return build(name).run()


@pytest.fixture(params=built(BUILDERS))
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def tiny(family: str) -> Iterator[Tiny]:
    """The family's model, shared by all tests and given back unswapped."""
    own_output(family)
    yield build(family)
    if hasattr(build(family).model, "_diffattn"):
        diffattn.restore(build(family).model)


@torch.no_grad()
@pytest.mark.parametrize("mechanism", ["softmax", "plain"])
def test_exact_attention_changes_nothing(tiny: Tiny, family: str, mechanism: str) -> None:
    handle = diffattn.apply(tiny.model, mechanism)
    if mechanism == "plain" and any(tokens.silent != (0, 0) for own in tiny.spatial.values() for tokens in own):
        assert error(tiny.run(), own_output(family)) < TOLERANCE  # queries are padded, and rounded in other groups
    else:
        assert torch.equal(tiny.run(), own_output(family))
    assert all(layer.reached for layer in handle.layers)


@torch.no_grad()
def test_clear_is_the_model_under_a_mask_made_by_hand(tiny: Tiny, family: str) -> None:
    want = by_hand(tiny, tiny.spatial)
    diffattn.apply(tiny.model, "clear", radius=RADIUS)
    got = tiny.run()
    assert error(got, want) < TOLERANCE
    assert error(got, own_output(family)) > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("family", ["AnimateDiff", "SparseCtrl-ControlNet", "SVD", "I2VGen-XL", "UNet3D", "Latte"])
def test_layers_along_the_frames_are_swapped_on_request(tiny: Tiny, family: str) -> None:
    want = by_hand(tiny, tiny.temporal)
    handle = diffattn.apply(
        tiny.model, "clear", radius=RADIUS, layers=lambda name: any(re.fullmatch(key, name) for key in tiny.temporal)
    )
    got = tiny.run()
    assert {layer.kind for layer in handle.layers} == {"temporal"}
    assert error(got, want) < TOLERANCE
    assert error(got, own_output(family)) > 1e-3


def state_of(model: nn.Module) -> list[Any]:
    """Whatever a swap could leave behind on a model, its modules and diffusers."""
    modules = [(name, sorted(module.__dict__), _hooks(module)) for name, module in model.named_modules()]
    registry = list(diffusers.hooks._helpers.AttentionProcessorRegistry._registry)
    return [modules, list(model.state_dict()), registry]


def modules_of_processors() -> set[str]:
    """Those that hold the globals of swapped processors: one for each of their classes, which stays."""
    return {name for name in sys.modules if "_intercepted_" in name}


def _hooks(module: nn.Module) -> list[int]:
    return [len(value) for key, value in sorted(module.__dict__.items()) if "hook" in key and hasattr(value, "__len__")]


def processors_of(model: nn.Module) -> dict[str, Any]:
    return {name: module.processor for name, module in model.named_modules() if hasattr(module, "processor")}


@torch.no_grad()
def test_restore_leaves_no_trace(tiny: Tiny, family: str) -> None:
    before, processors = state_of(tiny.model), processors_of(tiny.model)
    with diffattn.apply(tiny.model, "clear", radius=RADIUS):
        tiny.run()
        assert state_of(tiny.model) != before
    assert state_of(tiny.model) == before
    made = modules_of_processors()
    with diffattn.apply(tiny.model, "clear", radius=RADIUS + 1):
        tiny.run()
    assert made and modules_of_processors() == made, "a second swap makes no class anew"
    assert all(now is processors[name] for name, now in processors_of(tiny.model).items())
    assert torch.equal(tiny.run(), own_output(family))


@torch.no_grad()
def test_another_model_of_the_family_is_left_alone(tiny: Tiny, family: str) -> None:
    other = copy.deepcopy(tiny.model)
    diffattn.apply(tiny.model, "clear", radius=RADIUS)
    tiny.run()
    assert torch.equal(tiny.run(other), own_output(family))


@torch.no_grad()
def test_set_attn_processor_equals_apply(tiny: Tiny, family: str) -> None:
    if not hasattr(tiny.model, "set_attn_processor"):
        with pytest.raises(ValueError, match=r"has no set_attn_processor in diffusers: use diffattn\.apply"):
            diffattn.attn_processors(tiny.model, "clear", radius=RADIUS)
        return
    with diffattn.apply(tiny.model, "clear", radius=RADIUS):
        want = tiny.run()
    processors = diffattn.attn_processors(tiny.model, "clear", radius=RADIUS)
    assert processors.keys() == tiny.model.attn_processors.keys()
    tiny.model.set_attn_processor(processors)
    assert torch.equal(tiny.run(), want)
    diffattn.restore(tiny.model)
    assert torch.equal(tiny.run(), own_output(family))


@torch.no_grad()
def test_pooled_keys_fit_every_layer(tiny: Tiny, family: str) -> None:
    """CLEAR's extra keys: one weight per layer, and as many keys as the layer's grid has blocks."""
    divisible = all(t.rows % 2 == 0 and t.columns % 2 == 0 for layout in tiny.spatial.values() for t in layout)
    if all(t.rows == 1 for layout in tiny.spatial.values() for t in layout):
        with pytest.raises(ValueError, match="down_factor=2 does not divide the grid"):
            diffattn.apply(tiny.model, "clear", radius=RADIUS, down_factor=2)
        return
    handle = diffattn.apply(tiny.model, "clear", radius=RADIUS, down_factor=2)
    assert len(list(handle.parameters())) == len(handle.layers)
    if divisible:
        assert tiny.run().isfinite().all()
    else:
        with pytest.raises(ValueError, match="down_factor=2 does not divide the grid"):
            tiny.run()


def test_sana_is_refused() -> None:
    model = sana().model
    before = state_of(model)
    with pytest.raises(ValueError, match=r"SanaLinearAttnProcessor2_0 computes no softmax attention"):
        diffattn.apply(model, "clear", radius=RADIUS)
    assert state_of(model) == before


def test_blocks_that_attend_to_text_twice_are_kept() -> None:
    """Stable Diffusion's upscaler: the first attention of its blocks is cross-attention too."""
    tiny = BUILDERS["SD1.5"]()
    for module in tiny.model.modules():
        if "only_cross_attention" in vars(module):
            module.only_cross_attention = True
    with pytest.raises(ValueError, match="not a self-attention over the grid"):
        diffattn.apply(tiny.model, "clear", radius=RADIUS)


def test_gradients_are_those_under_the_mask_made_by_hand(tiny: Tiny) -> None:
    want = gradients(tiny.model, by_hand(tiny, tiny.spatial))
    diffattn.apply(tiny.model, "clear", radius=RADIUS)
    got = gradients(tiny.model, tiny.run())
    assert got.isfinite().all() and want.abs().max() > 0
    assert relative(got, want) < TOLERANCE


OTHER_SIZES: dict[str, tuple[dict[str, Any], tuple[int, int, int]]] = {
    # changed arguments of the forward, and their frames, rows and columns
    "Flux": ({"hidden_states": torch.randn(2, 54, 4), "img_ids": picture_ids(9, 6)}, (1, 9, 6)),
    "SD3": ({"hidden_states": torch.randn(2, 4, 18, 12)}, (1, 9, 6)),
    "Wan": ({"hidden_states": torch.randn(2, 4, 3, 10, 8)}, (3, 5, 4)),
    "SD1.5": ({"sample": torch.randn(2, 4, 12, 8)}, (1, 12, 8)),
    "AnimateDiff": ({"sample": torch.randn(2, 4, 5, 12, 8)}, (1, 12, 8)),
}
"""As many tokens in another shape."""


def at_other_size(tiny: Tiny, family: str) -> tuple[dict[str, Any], dict[str, tuple[Tokens, ...]]]:
    """Arguments and layouts of `OTHER_SIZES`; the grids of coarser levels are turned likewise."""
    changes, (frames, rows, columns) = OTHER_SIZES[family]
    first = next(iter(tiny.spatial.values()))[0]
    assert (first.columns, first.rows) == (rows, columns)
    layouts = {
        key: tuple(Tokens(t.before, frames, t.columns, t.rows, t.after) for t in layout)
        for key, layout in tiny.spatial.items()
    }
    return changes, layouts


other_sizes = pytest.mark.parametrize("family", OTHER_SIZES)


@torch.no_grad()
@other_sizes
def test_the_grid_is_read_at_every_forward(tiny: Tiny, family: str) -> None:
    changes, layouts = at_other_size(tiny, family)
    want, want_other = by_hand(tiny, tiny.spatial), by_hand(tiny, layouts, **changes)
    diffattn.apply(tiny.model, "clear", radius=RADIUS)
    for _ in range(2):
        assert error(tiny.run(), want) < TOLERANCE
        assert error(tiny.run(**changes), want_other) < TOLERANCE


def with_ids(tiny: Tiny, rows: int, columns: int, change: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    """A call for an image of another size, its references as they are, with changed ids."""
    ids = tiny.inputs["img_ids"]
    references = ids[..., tiny.spatial[JOINT][0].rows * tiny.spatial[JOINT][0].columns :, :]
    picture = picture_ids(rows, columns, ids.shape[-1]).expand(*ids.shape[:-2], -1, -1)
    ids = torch.cat([picture, references], dim=-2)
    call = {"img_ids": change(ids), "hidden_states": draw(2, ids.shape[-2], 4)}
    return call | ({"controlnet_cond": call["hidden_states"]} if "controlnet_cond" in tiny.inputs else {})


JOINT = r"(single_)?transformer_blocks\.\d+\.attn"
CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "bfloat16": lambda ids: ids.bfloat16(),
    "bfloat16, from 300 on": lambda ids: torch.cat([ids[..., :1], ids[..., 1:] + 300], dim=-1).bfloat16(),
    "float16, scaled": lambda ids: (0.3 * ids).half(),
    "scaled and shifted": lambda ids: 0.5 * ids - 2,
    "int32": lambda ids: ids.int(),
}


@torch.no_grad()
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("family", ["Flux", "Flux-Kontext", "Flux-ControlNet", "Flux2"])
def test_position_ids_of_any_kind(tiny: Tiny, family: str, change: str) -> None:
    """Pipelines cast ids to the prompt's dtype, and bfloat16 counts to 256."""
    after = tiny.spatial[JOINT][0].after
    size = (2, 261) if change == "bfloat16" else (5, 7)
    call = with_ids(tiny, *size, CHANGES[change])
    want = by_hand(tiny, {JOINT: (Tokens(TEXT, 1, *size, after),)}, **call)
    diffattn.apply(tiny.model, "clear", radius=RADIUS)
    assert error(tiny.run(**call), want) < TOLERANCE


@torch.no_grad()
def test_samples_may_have_ids_of_their_own() -> None:
    """As many tokens in two shapes."""
    tiny = build("Flux2")
    ids = torch.stack([torch.cat([picture_ids(*size, 4), tiny.inputs["img_ids"][0, 54:]]) for size in ((6, 9), (9, 6))])
    want = by_hand(tiny, {JOINT: (Tokens(TEXT, 1, 6, 9, 12), Tokens(TEXT, 1, 9, 6, 12))}, img_ids=ids)
    with diffattn.apply(tiny.model, "clear", radius=RADIUS):
        assert error(tiny.run(img_ids=ids), want) < TOLERANCE


@torch.no_grad()
def test_ids_that_list_no_picture() -> None:
    tiny = build("Flux")
    ids = tiny.inputs["img_ids"]
    with diffattn.apply(tiny.model, "clear", radius=RADIUS):
        for wrong, sizes in ((ids.flip(0), "6 x 9"), (0 * ids, "1 x 1"), (ids[torch.randperm(54)], "6 x 9")):
            with pytest.raises(ValueError, match=f"an image of {sizes} tokens row by row, got 54 tokens"):
                tiny.run(img_ids=wrong)
        with pytest.raises(ValueError, match="an image of 6 x 9 tokens row by row, got 53 tokens"):
            tiny.run(img_ids=ids[:53], hidden_states=tiny.inputs["hidden_states"][:, :53])
    with pytest.raises(ValueError, match="the grid is read from img_ids, which this call of the model leaves out"):
        family_of(tiny.model).layers[0].read(tiny.model, {"img_ids": None})


ALONE = {
    "SD3.5": r"transformer_blocks\.\d+\.attn2",
    "Wan": r"blocks\.\d+\.attn1",
    "LTX": r"transformer_blocks\.\d+\.attn1",
    "PixArt": r"transformer_blocks\.\d+\.attn1",
    "Lumina2": r"noise_refiner\.\d+\.attn",
    "HunyuanDiT": r"blocks\.\d+\.attn1",
    "HunyuanDiT-ControlNet": r"blocks\.\d+\.attn1",
}
"""Layers that see the cells alone: no text beside them that a surplus of tokens could be."""


@pytest.mark.parametrize("family", ALONE)
def test_a_surplus_of_tokens_is_an_error_where_no_text_comes_along(family: str) -> None:
    tiny = build(family)
    row = family_of(tiny.model)
    name = next(name for name, _ in tiny.model.named_modules() if re.fullmatch(ALONE[family], name))
    [layout] = find_layers(row, [name])[name].read(tiny.model, arguments(tiny.model, (), tiny.inputs))
    cells = layout.frames * layout.height * layout.width
    assert layout.grid(cells).tokens == cells
    for tokens in (cells - 1, cells + 1):
        with pytest.raises(ValueError, match=rf"sees {tokens} tokens, but .* = {cells} cells and no other tokens"):
            layout.grid(tokens)


def test_every_row_says_which_layers_see_the_cells_alone(tiny: Tiny, family: str) -> None:
    """By the tokens of the tiny models: text, padding or references on a side, or none of it."""
    names = [name for name, _ in tiny.model.named_modules()]
    for name, entry in find_layers(family_of(tiny.model), names).items():
        layouts = [own for key, own in tiny.spatial.items() if re.fullmatch(key, name)]
        if entry.owner is not None or not layouts or family.endswith("ControlNet"):
            continue
        read = entry.read(tiny.model, arguments(tiny.model, (), tiny.inputs))
        for tokens in layouts[0]:
            others = tokens.before + tokens.after
            assert all(layout.before == layout.after == 0 for layout in read) == (others == 0), name


def test_other_tokens_that_are_known_must_be_there() -> None:
    layout = Layout(2, 3, before=None, after=4)
    assert layout.grid(15) == diffattn.TokenGrid(2, 3, 1, 5, 4)
    with pytest.raises(ValueError, match=r"sees 9 tokens, but .* = 6 cells and 4 or more other tokens"):
        layout.grid(9)
    with pytest.raises(ValueError, match=r"sees 11 tokens, but .* = 6 cells and 4 other tokens"):
        Layout(2, 3, before=1, after=3).grid(11)


@torch.no_grad()
@pytest.mark.parametrize("argument", ["img_ids", "video_coords"])
def test_values_that_are_not_there(argument: str) -> None:
    """Under torch.export and on the meta device."""
    tiny = build("Flux" if argument == "img_ids" else "LTX")
    read = family_of(tiny.model).layers[0].read
    with pytest.raises(ValueError, match=f"read from the values of {argument}, and torch.export traces without"):
        read(tiny.model, {argument: torch.zeros(54, 3, device="meta")})


@pytest.fixture
def hand_made(tiny: Tiny) -> Callable[..., Tensor]:
    """Gradients under the hand-made masks, without checkpointing whatever the model does otherwise."""

    def compute(layouts: dict[str, tuple[Tokens, ...]] | None = None, **changes: Any) -> Tensor:
        return gradients(tiny.model, by_hand(tiny, layouts or tiny.spatial, **changes))

    return compute


@pytest.fixture
def checkpointing(tiny: Tiny) -> Iterator[Callable[[], None]]:
    yield tiny.model.enable_gradient_checkpointing
    tiny.model.disable_gradient_checkpointing()


CHECKPOINTED = [
    *OTHER_SIZES,
    "Flux2",
    "HunyuanVideo",
    "LTX",
    "CogVideoX",
    "Qwen-Image",
    "Z-Image-mixed",
    "Lumina2",
    "Mochi",
    "SVD",
]


@pytest.mark.parametrize("family", CHECKPOINTED)
def test_gradient_checkpointing_changes_no_gradient(
    tiny: Tiny, hand_made: Callable[..., Tensor], checkpointing: Callable[[], None]
) -> None:
    want = hand_made()
    checkpointing()
    diffattn.apply(tiny.model, "clear", radius=RADIUS)
    assert relative(gradients(tiny.model, tiny.run()), want) < TOLERANCE


@other_sizes
def test_checkpointed_layers_keep_the_grid_of_their_forward(
    tiny: Tiny, family: str, hand_made: Callable[..., Tensor], checkpointing: Callable[[], None]
) -> None:
    """A preview of another shape between forward and backward; then a step of training of that shape."""
    changes, layouts = at_other_size(tiny, family)
    want, want_other = hand_made(), hand_made(layouts, **changes)
    checkpointing()
    diffattn.apply(tiny.model, "clear", radius=RADIUS)
    for _ in range(2):
        output = tiny.run()
        with torch.no_grad():
            tiny.run(**changes)
        assert relative(gradients(tiny.model, output), want) < TOLERANCE
        assert relative(gradients(tiny.model, tiny.run(**changes)), want_other) < TOLERANCE


@pytest.mark.parametrize("family", ["Flux", "SD3", "Wan"])
def test_two_grids_of_as_many_tokens_are_told_apart(
    tiny: Tiny, family: str, hand_made: Callable[..., Tensor], checkpointing: Callable[[], None]
) -> None:
    """Two forwards go before their backward passes, in either order."""
    changes, layouts = at_other_size(tiny, family)
    want, want_other = hand_made(), gradients(tiny.model, by_hand(tiny, layouts, **changes))
    checkpointing()
    diffattn.apply(tiny.model, "clear", radius=RADIUS)
    for _ in range(2):
        first, second = tiny.run(), tiny.run(**changes)
        assert relative(gradients(tiny.model, second), want_other) < TOLERANCE
        assert relative(gradients(tiny.model, first), want) < TOLERANCE


def test_other_checkpointing_refuses_what_it_cannot_tell_apart() -> None:
    """Somebody's own checkpointing of the blocks, which knows nothing of the swap."""
    tiny = flux()
    changes, _ = at_other_size(tiny, "Flux")
    want = gradients(tiny.model, by_hand(tiny, tiny.spatial))
    for block in [*tiny.model.transformer_blocks, *tiny.model.single_transformer_blocks]:
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
    diffattn.apply(tiny.model, "clear", radius=RADIUS)
    first, _ = tiny.run(), tiny.run(**changes)
    with pytest.raises(RuntimeError, match="run backward after each forward"):
        gradients(tiny.model, first)
    assert relative(gradients(tiny.model, tiny.run()), want) < TOLERANCE


def test_reentrant_checkpointing_finds_the_grid_too() -> None:
    """Its forward pass runs without gradients."""
    tiny = flux()
    want = gradients(tiny.model, by_hand(tiny, tiny.spatial))
    recompute = functools.partial(checkpoint, use_reentrant=True)
    tiny.model.enable_gradient_checkpointing(recompute)
    changes, _ = at_other_size(tiny, "Flux")
    diffattn.apply(tiny.model, "clear", radius=RADIUS)
    output = tiny.run()
    with torch.no_grad():
        tiny.run(**changes)
    output.square().mean().backward()
    got = torch.cat([(p.new_zeros(p.shape) if p.grad is None else p.grad).flatten() for p in tiny.model.parameters()])
    assert relative(got, want) < TOLERANCE


def test_a_model_computed_again_as_a_whole_is_read_again() -> None:
    """Two grids of as many tokens are under way, and each is known when its turn comes."""
    tiny = flux()
    changes, layouts = at_other_size(tiny, "Flux")
    want = [
        gradients(tiny.model, by_hand(tiny, tiny.spatial)),
        gradients(tiny.model, by_hand(tiny, layouts, **changes)),
    ]
    diffattn.apply(tiny.model, "clear", radius=RADIUS)
    outputs = [checkpoint(lambda call=call: tiny.run(**call), use_reentrant=False) for call in ({}, changes)]
    for output, gradient in zip(outputs, want, strict=True):
        assert relative(gradients(tiny.model, output), gradient) < TOLERANCE


LISTS = {
    "MultiControlNetModel": "SD-ControlNet",
    "MultiControlNetUnionModel": "SD-ControlNet-Union",
    "FluxMultiControlNetModel": "Flux-ControlNet",
    "SD3MultiControlNetModel": "SD3-ControlNet",
    "QwenImageMultiControlNetModel": "Qwen-Image-ControlNet",
    "HunyuanDiT2DMultiControlNetModel": "HunyuanDiT-ControlNet",
}
"""Every class of diffusers that stands for a list of ControlNets -> what is in it."""


class Parts:
    """A pipeline as far as its parts go."""

    def __init__(self, **parts: nn.Module) -> None:
        self.components = parts


@torch.no_grad()
@pytest.mark.parametrize("name", LISTS)
def test_every_list_of_controlnets(name: str) -> None:
    """A net that is listed twice is swapped once."""
    nets = [BUILDERS[LISTS[name]]() for _ in "ab"]
    several = getattr(diffusers.models.controlnets, name)([nets[0].model, nets[1].model, nets[0].model])
    pipe = Parts(controlnet=several)
    wanted = [by_hand(net, net.spatial) for net in nets]
    for target, components in ((pipe, ["controlnet"]), (several, None)):
        handle = diffattn.apply(target, "clear", radius=RADIUS, components=components)
        for net, want in zip(nets, wanted, strict=True):
            assert error(net.run(), want) < TOLERANCE
        names = [row.layer for row in diffattn.summary(several).rows if row.swapped]
        assert len(names) == len(handle.layers) == 2 * len(set(names))
        diffattn.restore(target)
        assert not any(row.swapped for row in diffattn.summary(several).rows)


@torch.no_grad()
def test_layers_that_two_models_share_are_swapped_once() -> None:
    """Z-Image's ControlNet shares the transformer's first layers."""
    control, tiny = BUILDERS["Z-Image-ControlNet"](), BUILDERS["Z-Image"]()
    type(control.model).from_transformer(control.model, tiny.model)
    wanted = [by_hand(model, model.spatial) for model in (tiny, control)]
    pipe = Parts(transformer=tiny.model, controlnet=control.model)
    handle = diffattn.apply(pipe, "clear", radius=RADIUS, components=["transformer", "controlnet"])
    assert len({id(layer.module) for layer in handle.layers}) == len(handle.layers) == 6
    for model, want in zip((tiny, control, tiny), (*wanted, wanted[0]), strict=True):
        assert error(model.run(), want) < TOLERANCE
    handle.restore()
    assert torch.equal(tiny.run(), own_output("Z-Image"))


def test_layers_without_features_are_kept_by_what_compares_them() -> None:
    """A block of Z-Image's ControlNet gets the results of all blocks before it in one tensor."""
    model = BUILDERS["Z-Image-ControlNet"]().model
    with diffattn.apply(model, "token_merge") as handle:
        assert {layer.name for layer in handle.layers} == {"noise_refiner.0.attention"}
        notes = {row.layer: row.note for row in diffattn.summary(model).rows}
        assert notes["control_layers.0.attention"] == (
            "its block is not called with the block's input, which token_merge compares"
        )


@torch.no_grad()
def test_the_same_model_in_two_places_is_swapped_once() -> None:
    tiny = flux()
    pipe = Parts(transformer=tiny.model, transformer_2=tiny.model)
    handle = diffattn.apply(pipe, "clear", radius=RADIUS)
    assert len(handle.layers) == 4
    handle.restore()
    assert torch.equal(tiny.run(), own_output("Flux"))


@needs("diffusers", "0.42", "models of the table")
def test_the_readme_has_the_table_of_what_runs() -> None:
    assert support_table.README.exists()
    text = support_table.README.read_text()
    written = support_table.between_markers(text).group()
    assert written == support_table.support_table(build), "run PYTHONPATH=.:tests python scripts/support_table.py"
