"""What `describe` finds of models without a row: the row that it prints is right, or it says what is missing."""

import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import unlisted
from further.flux_like import chroma
from further.images import cogview4
from further.unets import unet2d
from hand_masks import RADIUS
from models import COLUMNS, ROWS, TEXT, Tiny, draw, lumina2, sana, sd3, z_image
from torch import nn
from unlisted import toy

import diffattn
from diffattn import families
from diffattn.description import Description
from diffattn.description.checks import checks_of
from diffattn.description.probing import Place
from diffattn.description.rows import join_patterns
from diffattn.description.watching import Forward
from diffattn.families import Family, picture
from diffattn.families.layout import transformer

pytestmark = pytest.mark.filterwarnings("ignore:In CPU autocast:UserWarning")


def describe(tiny: Tiny) -> Description:
    return families.describe(tiny.model, **tiny.inputs)


MISSING: dict[str, tuple[Callable[[], Tiny], list[str]]] = {
    "PRX": (
        unlisted.prx,
        [
            "blocks.N.attention: fewer queries than keys, cells among both",
        ],
    ),
    "Sana": (
        sana,
        ["transformer_blocks.N.attn1: SanaLinearAttnProcessor2_0 computes no softmax attention"],
    ),
    "Prior": (
        unlisted.prior,
        [
            "apply refuses it: its tokens lie on no grid",
            "transformer_blocks.N.attn1: no argument tells a grid of so many tokens",
            "no grid among the arguments: hidden_states (2, 12), timestep (2,), proj_embedding (2, 12)",
        ],
    ),
    "list": (z_image, ["no grid among the arguments: x (list), t (2,), cap_feats (list)"]),
    "tokens": (lambda: toy(unlisted.Rows), ["no grid among the arguments: hidden_states (2, 54, 4)"]),
    "another order": (
        lambda: toy(unlisted.ColumnByColumn),
        ["attn: the cells are in another order than frame by frame and row by row, or mixed"],
    ),
    "mixed": (lambda: toy(unlisted.MixedBefore), ["attn: the cells are in another order than", "or mixed"]),
    "no processor": (lambda: toy(unlisted.WithoutProcessor), ["attn: it asks for attention without a processor"]),
    "no attention": (lambda: toy(unlisted.OnlyMatrices), ["no call of softmax attention was seen"]),
    "another image": (
        unlisted.beside,
        ["no layer's queries and keys are the cells of a grid that was tried: style (2, 4, 6, 9) in patches of 1 x 1"],
    ),
    "two calls": (unlisted.twice, ["attn: other tokens lie between the cells"]),
    "helper": (
        lambda: toy(processor=unlisted.HelpedProcessor()),
        ["attn: in_a_helper() asks for attention, not HelpedProcessor.__call__ itself"],
    ),
    "causal": (lambda: toy(processor=unlisted.CausalProcessor()), ["attn: it attends in a causal order"]),
    "dropout": (lambda: toy(processor=unlisted.CausalProcessor(dropout=0.1)), ["or with dropout"]),
}


@pytest.mark.parametrize("name", MISSING)
def test_what_is_missing_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    build, told = MISSING[name]
    tiny = build()
    models = {cls.__name__ for cls in type(tiny.model).__mro__}
    rows = [row for row in families.FAMILIES if not models & set(row.models)]
    monkeypatch.setattr("diffattn.families.FAMILIES", rows)
    found = describe(tiny)
    assert found.row is None and not found.passed and not found.checks and found.known_row is None
    assert all(any(words in line for line in found.missing) for words in told), found.missing
    assert all(f"  {line}" in str(found) for line in found.missing)
    assert "no row has it yet; none can be written, see below what is missing" in str(found)


def test_samples_that_differ_are_left_to_a_reader_by_hand() -> None:
    """Lumina2's layers behind the refiner: each caption is as long as it is."""
    found = describe(lumina2())
    assert found.row is not None and "noise_refiner" in found.row and found.passed
    assert [line for line in found.missing if line.startswith("layers.N.attn: samples differ")]
    assert "passes its checks, with 1 missing" in str(found)


PAGE = """\
Masked: no row has it yet; the one below passes its checks

attention in one forward, (batch, heads, tokens, numbers):
  attn: 1 layer
    q, k, v (2, 2, 59, 8), mask bool (2, 2, 59, 59); AttnProcessor2_0, in reach
    grid: 6 x 9, 5 tokens before

grid, found in:
  hidden_states (2, 4, 6, 9) in patches of 1 x 1

row to try, in diffattn/families/image_transformers.py:
  Family(
      "Masked",
      ("Masked",),
      (
          Layers(r"attn", "spatial", picture(), has_features=False, mask="padding"),
      ),
  ),

checks:
  passed   2 samples lie alike
  passed   the grid is not square: height and width are told apart
  passed   softmax on 1 layer is the model bit for bit
  passed   clear(radius=2) on 1 spatial layer is the model under masks made from these places: error E, change E
  passed   restore leaves processors and hooks as they were, and the output bit for bit

The suite asks more of a row: gradients, other sizes, other mechanisms (see CONTRIBUTING.md)."""


def test_the_documents_show_what_it_prints(capsys: pytest.CaptureFixture[str]) -> None:
    text = (Path(__file__).resolve().parents[2] / "docs" / "how-it-works.md").read_text()
    [(code, page)] = re.findall(
        r"^```python\n((?:(?!```).)*?describe\(.*?)^```$.*?^```text\n(.*?)^```$", text, re.M | re.S
    )
    exec(code, {"diffattn": diffattn})
    assert without_numbers(capsys.readouterr().out) == without_numbers(page)


def without_numbers(page: str) -> str:
    """Errors are others on other machines."""
    return re.sub(r"\d\.\de[+-]\d\d", "E", page)


def test_the_page() -> None:
    assert without_numbers(str(describe(unlisted.masked()))) == PAGE


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


@pytest.mark.parametrize("build", [chroma, unet2d, unlisted.prx, lambda: toy(unlisted.Noisy)])
def test_nothing_is_left_behind(build: Callable[[], Tiny], caplog: pytest.LogCaptureFixture) -> None:
    """Neither on the model nor in the library, the random numbers or the log; and a later swap warns as ever."""
    tiny = build()
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(1)
        own = tiny.run()
    tiny.model.train()
    before, rows, numbers = state_of(tiny.model), [*families.FAMILIES], torch.get_rng_state()
    theta = getattr(getattr(tiny.model, "pos_embed", None), "theta", None)
    with caplog.at_level(logging.DEBUG, logger="diffattn"):
        found = describe(tiny)
    assert not caplog.records
    assert state_of(tiny.model) == before and rows == families.FAMILIES
    assert torch.equal(torch.get_rng_state(), numbers)
    assert getattr(getattr(tiny.model, "pos_embed", None), "theta", None) == theta
    tiny.model.eval()
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(1)
        assert torch.equal(tiny.run(), own)
    assert all(parameter.grad is None for parameter in tiny.model.parameters())
    if build is chroma and found.family is not None:
        with torch.no_grad(), diffattn.apply(tiny.model, "clear", radius=4):
            tiny.run()
        assert "times faster" in caplog.text


@pytest.mark.parametrize("which", [0, 1, 4, 9, 10, 11, 12, 13])
def test_a_forward_that_fails_leaves_nothing_behind(which: int) -> None:
    """At once, in the second, while cells are measured, while the row is tried, at last."""
    tiny = toy(unlisted.Failing, which)
    tiny.model.train()
    before, rows, numbers = state_of(tiny.model), [*families.FAMILIES], torch.get_rng_state()
    if which in (10, 11, 12):
        [failed] = [check for check in describe(tiny).checks if check.passed is False]
        assert failed.told.startswith("softmax" if which == 10 else "clear")
        assert "RuntimeError: the model fails" in failed.told
    else:
        with pytest.raises(RuntimeError, match="the model fails"):
            describe(tiny)
    assert state_of(tiny.model) == before and rows == families.FAMILIES
    assert torch.equal(torch.get_rng_state(), numbers)
    assert not hasattr(tiny.model, "_diffattn")


def test_what_it_is_given_is_left_alone() -> None:
    """A forward may write into its arguments, or draw from a generator."""
    tiny = toy(unlisted.Writing)
    given = tiny.inputs["hidden_states"].clone()
    assert describe(tiny).passed
    assert torch.equal(tiny.inputs["hidden_states"], given)
    tiny = toy(unlisted.Noisy)
    tiny.inputs["generator"] = torch.Generator().manual_seed(5)
    state = tiny.inputs["generator"].get_state()
    assert describe(tiny).passed
    assert torch.equal(tiny.inputs["generator"].get_state(), state)


def test_outputs_that_cannot_be_compared_are_refused() -> None:
    with pytest.raises(ValueError, match="expected the same output of Noisy from the same inputs, got another"):
        describe(toy(unlisted.Noisy, unlisted.out_of_torch))
    tiny = toy()
    tiny.inputs["hidden_states"][0, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="expected a finite output of Toy, got infinity or NaN"):
        describe(tiny)
    tiny.model.leave = unlisted.Nothing()
    with pytest.raises(ValueError, match="expected a forward that gives tensors, got NoneType"):
        describe(tiny)


def test_pipelines_are_no_models() -> None:
    with pytest.raises(TypeError, match="expected a model, such as pipe.transformer or pipe.unet, got object"):
        families.describe(object())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(dtype: torch.dtype) -> None:
    tiny = chroma()
    tiny.model.to(dtype)
    tiny.inputs = {name: value.to(dtype) if value.is_floating_point() else value for name, value in tiny.inputs.items()}
    found = describe(tiny)
    assert found.passed and not found.missing and all(check.passed for check in found.checks)


def test_as_many_tokens_of_text_as_cells() -> None:
    """Which argument holds the cells is a doubt; where it has a usual name, it is none."""
    tiny = unlisted.numbered(text=60)
    doubt = "img and txt have tokens enough for the cells: img was taken"
    assert doubt in [check.told for check in describe(tiny).checks if check.passed is None]
    tiny = unlisted.masked()
    tiny.inputs["encoder_hidden_states"] = draw(2, ROWS * COLUMNS, 4)
    tiny.inputs["text_mask"] = torch.ones(2, ROWS * COLUMNS, dtype=torch.bool)
    found = describe(tiny)
    assert all(check.passed for check in found.checks)
    assert found.kinds[0].told == "6 x 9, 54 tokens before"


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
    tiny = cogview4()
    tiny.inputs = {name: value[:1] for name, value in tiny.inputs.items()}
    tiny.inputs["hidden_states"] = draw(1, 4, 8, 8)
    found = describe(tiny)
    assert [check.told for check in found.checks if check.passed is None] == [
        "samples are told apart: give inputs with a batch of two",
        "height and width are told apart: give inputs that are not square",
    ]
    assert "passes its checks, with 2 open questions" in str(found)


def test_windows_that_change_nothing_prove_nothing() -> None:
    tiny = toy()
    tiny.inputs["hidden_states"] = draw(2, 4, 1, 2)
    told = [check.told for check in describe(tiny).checks if check.passed is None]
    assert told and all("they change nothing; give a larger grid" in line for line in told)


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
