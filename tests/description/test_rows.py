"""The row that `describe` prints for a model without one, pasted as it stands, is right."""

import re
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import unlisted
from further import NEWER
from hand_masks import RADIUS, TOLERANCE, by_hand, error
from models import BUILDERS, TEXT, Tiny, Tokens, draw
from releases import built

import diffattn
from diffattn import families
from diffattn.families import Family, family_of, find_layers, image_transformers, readers, unets, video_readers

pytestmark = pytest.mark.filterwarnings("ignore:In CPU autocast:UserWarning")


def block(text: str, title: str) -> str:
    """The indented lines under a title of what is printed."""
    match = re.search(rf"^{title}.*:\n((?:(?:  .*)?\n)+)", f"{text}\n", flags=re.MULTILINE)
    return textwrap.dedent(match[1]).strip() if match else ""


def pasted(text: str) -> Family:
    """The row, put into `ROWS` of a module of `families`, and its readers into the readers' module."""
    names = {**vars(unets), **vars(image_transformers), **vars(video_readers), **vars(readers)}
    exec(block(text, "reader to write"), names)
    [family] = eval(f"({block(text, 'row to try')})", names)
    assert isinstance(family, Family)
    return family


@torch.no_grad()
def contract(tiny: Tiny, family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    """What tests/families asks first of a row, by masks that are written by hand."""
    monkeypatch.setattr("diffattn.families.FAMILIES", [family])
    dense = tiny.run()
    names = [name for name, _ in tiny.model.named_modules()]
    chosen = find_layers(family, names)
    by_kind = {"spatial": tiny.spatial, "temporal": tiny.temporal}
    for kind, layouts in by_kind.items():
        told = {name for name in names if any(re.fullmatch(pattern, name) for pattern in layouts)}
        assert {name for name in chosen if chosen[name].kind == kind} == told
    with diffattn.apply(tiny.model, "softmax", layers="*") as handle:
        assert torch.equal(tiny.run(), dense)
        assert {layer.name for layer in handle.layers if layer.reached} == set(chosen)
    for kind, layouts in by_kind.items():
        if layouts:
            want = by_hand(tiny, layouts)
            with diffattn.apply(
                tiny.model, "clear", radius=RADIUS, layers=lambda name, kind=kind: chosen[name].kind == kind
            ):
                assert error(tiny.run(), want) < TOLERANCE
            assert error(want, dense) > 1e-3
    assert torch.equal(tiny.run(), dense)


@dataclass(frozen=True)
class Case:
    """A model without a row, and the row that it needs."""

    build: Callable[[], Tiny]
    row: str
    readers: str = ""
    file: str = "image_transformers.py"
    still: tuple[str, ...] = ()
    """What its inputs leave open."""


TOKENS3D = '''\
def tokens3d(module: nn.Module, call: Arguments) -> tuple[Layout, ...]:
    """hidden_states (b, frames, height, width, c)."""
    frames, height, width = (call["hidden_states"].shape[axis] for axis in (1, 2, 3))
    return (Layout(height, width, frames, before=0, after=None),)
'''
LISTED = '''\
def token_ids(module: nn.Module, call: Arguments) -> tuple[Layout, ...]:
    """Those of the cells among token_ids."""
    samples = _samples(_values(call, "token_ids"), axes=2)
    grids = (_first_picture(ids[-call["img"].shape[1] :]) for ids in samples)
    return _common(Layout(own.height, own.width) for own in grids)
'''
NUMBERED = '''\
def numbered(module: nn.Module, call: Arguments) -> tuple[Layout, ...]:
    """height and width and frames of the tokens of img (b, n, c)."""
    return (Layout(call["height"], call["width"], call["frames"], before=0, after=None),)
'''
FRAMED = '''\
def coords(module: nn.Module, call: Arguments) -> tuple[Layout, ...]:
    """Those of the cells among coords."""
    samples = _samples(_values(call, "coords"), axes=2)
    grids = (_video(ids[:, :3].T) for ids in samples)
    return _common(Layout(own.height, own.width, own.frames, before=0) for own in grids)
'''
PATCHED = '''\
def patched(module: nn.Module, call: Arguments) -> tuple[Layout, ...]:
    """image (b, c, height, width)."""
    height, width = (call["image"].shape[axis] for axis in (2, 3))
    return (Layout(height // 4, width // 4, before=0),)
'''
SPACE_TIME = '''\
def space_time_frame(module: nn.Module, call: Arguments) -> tuple[Layout, ...]:
    """video (b, c, frames, height, width)."""
    height, width = (call["video"].shape[axis] for axis in (3, 4))
    return (Layout(height, width, before=0, after=None),)


def space_time_along_frames(module: nn.Module, call: Arguments) -> tuple[Layout, ...]:
    """video (b, c, frames, height, width)."""
    frames = call["video"].shape[2]
    return (Layout(1, 1, frames, before=0),)
'''
SPACE_TIME_ROW = """\
Family(
    "SpaceTime",
    ("SpaceTime",),
    (
        Layers(r"space", "spatial", space_time_frame, has_features=False),
        Layers(r"time", "temporal", space_time_along_frames, has_features=False),
    ),
),"""


def alone(name: str, reader: str, more: str = "") -> str:
    """The row of a toy with one layer and no block around it."""
    return (
        f'Family(\n    "{name}",\n    ("{name}",),\n    (\n'
        f'        Layers(r"attn", "spatial", {reader}, has_features=False{more}),\n    ),\n),'
    )


BOTH = (
    "5 tokens lie before the cells and 3 behind: the row has 3 behind them in every call, and any number before; "
    "describe it again with another length of text"
)
BOTH_TURNED = (
    "3 tokens lie before the cells and 5 behind: the row has 3 before them in every call, and any number behind; "
    "describe it again with another length of text"
)
CASES = {
    "channels last": Case(unlisted.channels_last, alone("Tokens3D", "tokens3d"), TOKENS3D, "video_transformers.py"),
    "ids": Case(unlisted.listed, alone("Listed", "token_ids"), LISTED),
    "numbers": Case(unlisted.numbered, alone("Numbered", "numbered"), NUMBERED, "video_transformers.py"),
    "coordinates": Case(
        unlisted.framed,
        alone("Framed", "coords"),
        FRAMED,
        "video_transformers.py",
        ("coords list 3 times 4 x 5 tokens: taken for the frames of a video",),
    ),
    "by the condition": Case(unlisted.ignoring, alone("Ignoring", 'picture("control", before=0)')),
    "patches": Case(unlisted.patched, alone("Patched", "patched").replace("attn", "mixer"), PATCHED),
    "tokens behind": Case(unlisted.between, alone("Between", "picture(after=3)"), still=(BOTH,)),
    "tokens before": Case(
        lambda: unlisted.between(text_first=False),
        alone("Between", "picture(before=3, after=None)"),
        still=(BOTH_TURNED,),
    ),
    "space and time": Case(unlisted.space_time, SPACE_TIME_ROW, SPACE_TIME, "video_transformers.py"),
    "padding": Case(unlisted.masked, alone("Masked", "picture()", ', mask="padding"')),
    "each its mask": Case(lambda: unlisted.masked(causal=True), alone("Masked", "picture()", ', mask="queries"')),
}


@pytest.mark.parametrize("name", CASES)
def test_the_row_of_an_unknown_model(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case, tiny = CASES[name], CASES[name].build()
    found = families.describe(tiny.model, **tiny.inputs)
    assert (found.row, found.readers.strip(), found.file) == (case.row, case.readers.strip(), case.file)
    assert not found.missing and found.known_row is None and found.passed
    assert tuple(check.told for check in found.checks if check.passed is None) == case.still
    contract(tiny, pasted(str(found)), monkeypatch)


REMOVED = ["Flux-Kontext", "Wan", "CogView4", "Krea2", "Latte", "Chroma", "UNet2D"]
FURTHER = [
    "SD3.5", "LTX", "LTX-2", "CogVideoX-1.5", "Qwen-Image-Edit", "HunyuanVideo", "HunyuanVideo-1.5", "HiDream",
    "AuraFlow", "HunyuanImage", "Kandinsky5", "Mochi", "SDXL", "AnimateDiff", "SparseCtrl-ControlNet", "ControlNet-XS",
]  # fmt: skip


KEYFRAMES = "60 of the 80 tokens of hidden_states, the first, were taken for the cells"


def slow(names: list[str]) -> list[Any]:
    """As `built`, and slow."""
    marks = [pytest.param(name, marks=pytest.mark.slow) for name in names if name not in NEWER]
    newer = [pytest.param(*name.values, marks=[*name.marks, pytest.mark.slow]) for name in built(NEWER.keys() & names)]
    return [*marks, *newer]


@pytest.mark.parametrize("name", [*built(REMOVED), *slow(FURTHER)])
def test_the_row_of_a_model_whose_own_is_removed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """References and padded text behind, text before, calls sample by sample, patches of frames, levels."""
    tiny = BUILDERS[name]()
    known = family_of(tiny.model)
    monkeypatch.setattr("diffattn.families.FAMILIES", [row for row in families.FAMILIES if row is not known])
    found = families.describe(tiny.model, **tiny.inputs)
    assert not found.missing and found.known_row is None and found.passed
    told = [check.told for check in found.checks if not check.passed]
    assert told == ([KEYFRAMES] if name == "LTX-2" else [])
    family = pasted(str(found))
    contract(tiny, family, monkeypatch)
    assert family.timestep == known.timestep and family.latent == known.latent


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("CogView4", dict(hidden_states=(2, 4, 10, 8), encoder_hidden_states=(2, TEXT + 3, 12))),
        ("AuraFlow", dict(hidden_states=(2, 4, 10, 8), encoder_hidden_states=(2, TEXT + 3, 12))),
    ],
)
def test_the_row_is_right_at_other_sizes(
    name: str, changes: dict[str, tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """More text, and an image of another shape."""
    tiny = BUILDERS[name]()
    [(pattern, (own,))] = tiny.spatial.items()
    given = {key: draw(*shape) for key, shape in changes.items()}
    want = by_hand(tiny, {pattern: (Tokens(own.before + 3, 1, 5, 4),)}, **given)
    family = pasted(str(families.describe(tiny.model, **tiny.inputs)))
    monkeypatch.setattr("diffattn.families.FAMILIES", [family])
    with diffattn.apply(tiny.model, "clear", radius=RADIUS):
        assert error(tiny.run(**given), want) < TOLERANCE


@torch.no_grad()
def test_numbers_are_read_at_every_call(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = unlisted.numbered()
    family = pasted(str(families.describe(tiny.model, **tiny.inputs)))
    tiny.inputs: dict[str, Any] = dict(img=draw(2, 54, 4), txt=draw(2, 2, 4), height=6, width=9)
    tiny.spatial = {"attn": (Tokens(0, 1, 6, 9, 2),)}
    contract(tiny, family, monkeypatch)


@pytest.mark.parametrize("name", ["Flux-Kontext", "SD3"])
def test_the_row_that_a_model_has_is_named(name: str) -> None:
    tiny = BUILDERS[name]()
    known = family_of(tiny.model)
    found = families.describe(tiny.model, **tiny.inputs)
    assert found.known_row == known.name and f"the row {known.name!r} has it" in str(found)
