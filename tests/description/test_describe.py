"""What `describe` finds of models without a row: the row that it prints is right, or it says what is missing."""

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import unlisted
from hand_masks import RADIUS, TOLERANCE, by_hand, error
from models import BUILDERS, COLUMNS, ROWS, TEXT, Tiny, Tokens, draw, lumina2, sana, sd3, z_image
from torch import nn
from unlisted import toy

import diffattn
from diffattn import families
from diffattn.description import Description
from diffattn.description.checks import checks_of
from diffattn.description.probing import Place
from diffattn.description.rows import evaluated, join_patterns
from diffattn.description.watching import Forward
from diffattn.families import Family, family_of, find_layers, picture
from diffattn.families.layout import transformer

pytestmark = pytest.mark.filterwarnings("ignore:In CPU autocast:UserWarning")


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small spend nearly all their time waiting for a second thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@dataclass(frozen=True)
class Case:
    """A model without a row, and the row that it needs."""

    build: Callable[[], Tiny]
    row: str
    readers: str = ""
    file: str = "image_transformers.py"


LATTE = '''\
def latte_along_frames(module: nn.Module, call: Arguments) -> tuple[Layout, ...]:
    """hidden_states (b, c, frames, height, width)."""
    frames = call["hidden_states"].shape[2]
    return (Layout(1, 1, frames, before=0),)
'''
CHANNELS_LAST = '''\
def tokens3d(module: nn.Module, call: Arguments) -> tuple[Layout, ...]:
    """hidden_states (b, frames, height, width, c)."""
    frames, height, width = (call["hidden_states"].shape[axis] for axis in (1, 2, 3))
    return (Layout(height, width, frames, before=0, after=None),)
'''
LISTED = '''\
def position_ids(module: nn.Module, call: Arguments) -> tuple[Layout, ...]:
    """Those of the image among the ids of all tokens."""
    samples = _samples(_values(call, "position_ids"), axes=2)
    return _common(_first_picture(module, ids[-call["hidden_states"].shape[1] :]) for ids in samples)
'''
CASES = {
    "Chroma": Case(
        unlisted.chroma,
        """\
Family(
    "Chroma",
    ("ChromaTransformer2DModel",),
    transformer(r"(single_)?transformer_blocks\\.\\d+\\.attn", flux_ids),
    rope="pos_embed",
),""",
    ),
    "CogView4": Case(
        unlisted.cogview4,
        """\
Family(
    "CogView4",
    ("CogView4Transformer2DModel",),
    transformer(r"transformer_blocks\\.\\d+\\.attn1", picture()),
    rope="rope",
),""",
    ),
    "AuraFlow": Case(
        unlisted.auraflow,
        """\
Family(
    "AuraFlow",
    ("AuraFlowTransformer2DModel",),
    transformer(r"(joint_|single_)transformer_blocks\\.\\d+\\.attn", picture()),
),""",
    ),
    "Latte": Case(
        unlisted.latte,
        """\
Family(
    "Latte",
    ("LatteTransformer3DModel",),
    (
        Layers(r"transformer_blocks\\.\\d+\\.attn1", "spatial", picture(before=0)),
        Layers(r"temporal_transformer_blocks\\.\\d+\\.attn1", "temporal", latte_along_frames),
    ),
),""",
        LATTE,
        "video_transformers.py",
    ),
    "UNet2D": Case(
        unlisted.unet2d,
        """\
Family(
    "UNet2D",
    ("UNet2DModel",),
    (
        Layers(r"(down_blocks\\.\\d+|mid_block|up_blocks\\.\\d+)\\.attentions\\.\\d+", "spatial", feature_map, r"(.*)"),
    ),
    latent="sample",
),""",
        file="unets.py",
    ),
    "channels last": Case(
        unlisted.channels_last,
        'Family("Tokens3D", ("Tokens3D",), transformer(r"attn", tokens3d)),',
        CHANNELS_LAST,
        "video_transformers.py",
    ),
    "ids": Case(unlisted.listed, 'Family("Listed", ("Listed",), transformer(r"attn", position_ids)),', LISTED),
}


def describe(tiny: Tiny) -> Description:
    return families.describe(tiny.model, **tiny.inputs)


def only(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library knows this row and no other."""
    monkeypatch.setattr("diffattn.families.FAMILIES", [family])


@torch.no_grad()
@pytest.mark.parametrize("name", CASES)
def test_the_row_that_is_printed_is_right(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES[name]
    tiny = case.build()
    dense = tiny.run()
    found = describe(tiny)
    assert (found.row, found.readers, found.file, found.missing) == (case.row, case.readers, case.file, ())
    assert found.passed and all(check.passed for check in found.checks)
    assert all(line.strip() in str(found) for line in [*case.row.splitlines(), *case.readers.splitlines()])

    only(evaluated(case.row, case.readers), monkeypatch)
    with diffattn.apply(tiny.model, "softmax") as handle:
        assert torch.equal(tiny.run(), dense)
        assert all(layer.reached for layer in handle.layers)
    for layouts in filter(None, (tiny.spatial, tiny.temporal)):
        want = by_hand(tiny, layouts)
        chosen = find_layers(families.FAMILIES[0], [name for name, _ in tiny.model.named_modules()])
        kind = "temporal" if layouts is tiny.temporal else "spatial"
        with diffattn.apply(
            tiny.model, "clear", radius=RADIUS, layers=lambda name, kind=kind: chosen[name].kind == kind
        ):
            assert error(tiny.run(), want) < TOLERANCE
        assert error(want, dense) > 1e-3
    assert torch.equal(tiny.run(), dense)


@torch.no_grad()
@pytest.mark.parametrize("name", ["CogView4", "AuraFlow"])
def test_the_row_is_right_at_other_sizes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """More text, and an image of another shape."""
    tiny = CASES[name].build()
    [(pattern, (own,))] = tiny.spatial.items()
    changes = dict(hidden_states=draw(2, 4, 10, 8), encoder_hidden_states=draw(2, TEXT + 3, 12))
    want = by_hand(tiny, {pattern: (Tokens(own.before + 3, 1, 5, 4),)}, **changes)
    family = describe(tiny).family
    assert family is not None
    only(family, monkeypatch)
    with diffattn.apply(tiny.model, "clear", radius=RADIUS):
        assert error(tiny.run(**changes), want) < TOLERANCE


KNOWN = [
    "Flux-Kontext",
    "SD3.5",
    "Wan",
    "HunyuanVideo",
    "LTX",
    "CogVideoX-1.5",
    "Qwen-Image-Edit",
    "Mochi",
    "SDXL",
]


@pytest.mark.parametrize("name", KNOWN)
def test_known_families_are_found_again(name: str) -> None:
    """References and padded text behind, text before, calls sample by sample, patches of frames, levels."""
    tiny = BUILDERS[name]()
    found, known = describe(tiny), family_of(tiny.model)
    assert found.passed and found.known_row == known.name and f"the row {known.name!r} has it" in str(found)
    assert found.family is not None
    names = [name for name, _ in tiny.model.named_modules()]
    assert set(find_layers(found.family, names)) == {layer for kind in found.kinds for layer in kind.layers} - {
        layer for kind in found.kinds if kind.verdict == "kept" for layer in kind.layers
    }
    given = families.arguments(tiny.model, (), tiny.inputs)
    for layer, entry in find_layers(found.family, names).items():
        own = find_layers(known, names)[layer]
        if entry.owner is None:
            assert entry.read(tiny.model, given) == own.read(tiny.model, given)
        else:
            assert families.owner_of(entry, layer) == families.owner_of(own, layer) and entry.read is own.read


MISSING: dict[str, tuple[Callable[[], Tiny], list[str]]] = {
    "PRX": (
        unlisted.prx,
        [
            "PRXTransformer2DModel can't be swapped: its image is asked alone and answered by text and image",
            "blocks.N.attention: fewer queries than keys, cells among both",
        ],
    ),
    "Sana": (
        sana,
        ["transformer_blocks.N.attn1: SanaLinearAttnProcessor2_0 computes no softmax attention"],
    ),
    "list": (z_image, ["no grid among the arguments: x (list), t (2,), cap_feats (list)"]),
    "tokens": (lambda: toy(unlisted.Rows), ["no grid among the arguments: hidden_states (2, 54, 4)"]),
    "another order": (
        lambda: toy(unlisted.ColumnByColumn),
        ["attn: the cells are in another order than frame by frame and row by row, or mixed"],
    ),
    "mixed": (lambda: toy(unlisted.MixedBefore), ["attn: the cells are in another order than", "or mixed"]),
    "no processor": (lambda: toy(unlisted.WithoutProcessor), ["attn: it asks for attention without a processor"]),
    "helper": (
        lambda: toy(processor=unlisted.HelpedProcessor()),
        ["attn: in_a_helper() asks for attention, not HelpedProcessor.__call__ itself"],
    ),
    "causal": (lambda: toy(processor=unlisted.CausalProcessor()), ["attn: it attends in a causal order"]),
}


@pytest.mark.parametrize("name", MISSING)
def test_what_is_missing_is_named(name: str) -> None:
    build, told = MISSING[name]
    found = describe(build())
    assert found.row is None and not found.passed and not found.checks
    assert all(any(words in line for line in found.missing) for words in told), found.missing
    assert all(f"  {line}" in str(found) for line in found.missing)


def test_samples_that_differ_are_left_to_a_reader_by_hand() -> None:
    """Lumina2's layers behind the refiner: each caption is as long as it is."""
    found = describe(lumina2())
    assert found.row is not None and "noise_refiner" in found.row and found.passed
    assert [line for line in found.missing if line.startswith("layers.N.attn: samples differ")]


def test_one_line_for_each_kind_of_call() -> None:
    lines = str(describe(unlisted.latte())).splitlines()
    assert lines[2:5] == [
        "  transformer_blocks.N.attn1 (2): q (10, 2, 54, 8) k v alike no mask; AttnProcessor2_0, in reach; "
        "grid: 6 x 9, the cells alone",
        "  transformer_blocks.N.attn2 (2): q (10, 2, 54, 8) k (10, 2, 5, 8) v (10, 2, 5, 8) no mask; AttnProcessor2_0, "
        "in reach; kept: its keys do not depend on the cells: attention to text or other prompts",
        "  temporal_transformer_blocks.N.attn1 (2): q (108, 2, 5, 8) k v alike no mask; AttnProcessor2_0, in reach; "
        "grid: 5 frames, the cells alone",
    ]


def state_of(model: nn.Module) -> list[Any]:
    return [
        (
            name,
            sorted(vars(module)),
            id(getattr(module, "processor", None)),
            module.training,
            [*map(len, _hooks(module))],
        )
        for name, module in model.named_modules()
    ]


def _hooks(module: nn.Module) -> list[Any]:
    return [value for key, value in sorted(vars(module).items()) if "hook" in key and hasattr(value, "__len__")]


@pytest.mark.parametrize("build", [unlisted.chroma, unlisted.unet2d, unlisted.prx])
def test_nothing_is_left_behind(build: Callable[[], Tiny], caplog: pytest.LogCaptureFixture) -> None:
    """Neither on the model nor in the library, the random numbers or the log; and a later swap warns as ever."""
    tiny = build()
    tiny.model.train()
    with torch.no_grad():
        own = tiny.run()
    before, rows, random = state_of(tiny.model), [*families.FAMILIES], torch.get_rng_state()
    theta = getattr(getattr(tiny.model, "pos_embed", None), "theta", None)
    with caplog.at_level(logging.DEBUG, logger="diffattn"):
        found = describe(tiny)
    assert not caplog.records
    assert state_of(tiny.model) == before and rows == families.FAMILIES
    assert torch.equal(torch.get_rng_state(), random)
    assert getattr(getattr(tiny.model, "pos_embed", None), "theta", None) == theta
    with torch.no_grad():
        assert torch.equal(tiny.run(), own)
    assert all(parameter.grad is None for parameter in tiny.model.parameters())
    if build is unlisted.chroma and found.family is not None:
        families.FAMILIES.insert(0, found.family)
        try:
            with torch.no_grad(), diffattn.apply(tiny.model, "clear", radius=4):
                tiny.run()
        finally:
            del families.FAMILIES[0]
        assert "times faster" in caplog.text


def test_a_wrong_row_fails() -> None:
    """Text before the image, where it lies behind."""
    tiny = sd3()
    name = r"transformer_blocks\.\d+\.attn"
    layers = [f"transformer_blocks.{i}.attn" for i in range(3)]
    places = {layer: [Place((1, ROWS, COLUMNS), 0, TEXT)] for layer in layers}
    kinds = dict.fromkeys(layers, "spatial")
    for read, right in ((picture(), False), (picture(before=0, after=None), True)):
        family = Family("SD3", ("SD3Transformer2DModel",), transformer(name, read))
        checks = checks_of(Forward(tiny.model, tiny.inputs), family, kinds, places, video=False)
        assert [check.passed for check in checks] == [True, True, right, True]
        assert ("FAILED" in str(checks[2])) is not right
    refusing = Family("SD3", ("SD3Transformer2DModel",), transformer(name, picture(before=0)))
    checks = checks_of(Forward(tiny.model, tiny.inputs), refusing, kinds, places, video=False)
    assert checks[2].passed is False and "ValueError: the layer sees 59 tokens" in checks[2].told
    assert checks[3].passed


def test_inputs_that_tell_too_little_are_named() -> None:
    tiny = unlisted.cogview4()
    tiny.inputs = {name: value[:1] for name, value in tiny.inputs.items()}
    tiny.inputs["hidden_states"] = draw(1, 4, 8, 8)
    told = [check.told for check in describe(tiny).checks if check.passed is None]
    assert told == [
        "samples are told apart: give inputs with a batch of two",
        "height and width are told apart: give inputs that are not square",
    ]


def test_a_swapped_model_is_refused() -> None:
    tiny = sd3()
    with (
        diffattn.apply(tiny.model, "clear", radius=RADIUS),
        pytest.raises(ValueError, match="with its own attention; call diffattn.restore"),
    ):
        describe(tiny)


@pytest.mark.parametrize(
    ("names", "others", "pattern"),
    [
        (["layers.0.attn", "layers.1.attn"], ["layers.0.attn2"], r"layers\.\d+\.attn"),
        (["layers.3.attn", "layers.7.attn"], ["layers.4.attn"], r"layers\.(3|7)\.attn"),
        (["blocks.0.attn", "single_blocks.0.attn"], [], r"(single_)?blocks\.\d+\.attn"),
        (["down.0.attn", "mid.attn"], ["up.0.attn"], r"(down\.\d+|mid)\.attn"),
    ],
)
def test_patterns_take_these_layers_and_no_others(names: list[str], others: list[str], pattern: str) -> None:
    assert join_patterns(names, others) == pattern


def test_it_is_found_where_rows_are() -> None:
    assert families.describe is diffattn.describe
