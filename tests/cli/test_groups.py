"""Options of a command that are fields of a dataclass."""

from dataclasses import dataclass
from fractions import Fraction
from typing import Annotated, Any, Literal

import pytest
import typer
from typer.testing import CliRunner

from diffattn.cli.frame import App
from diffattn.cli.groups import Group, taken
from diffattn.options import Help, Must, at_least, changed, check_fields


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """As a pipeline has it."""

    prompt: Annotated[str, Help("What to show.")]
    num_inference_steps: Annotated[int, at_least(1), Help("Denoising steps.", "--steps")] = 20
    rate: Annotated[Fraction | None, Help("Frame rate.")] = None
    colors: Annotated[Literal["adain", "wavelet"] | None, Help("Colours, or none.")] = "adain"
    lengths: Annotated[tuple[int, ...] | None, Must("numbers with commas between"), Help("Of each rank.")] = None
    fast: Annotated[bool, Help("Faster.", panel="Speed")] = False
    hidden: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        check_fields(self)


def run(*arguments: str, **options: Any) -> tuple[Any, str]:
    """What the command took, and what it said."""
    found: list[Any] = []
    app = App(pretty_exceptions_enable=False, rich_markup_mode="rich")

    @app.command(groups=[Group(f"{__name__}:Sampling", **options)])
    def make(context: typer.Context, seed: int = 7) -> None:
        """Make something."""
        found.append(taken(context, "Sampling"))

    result = CliRunner().invoke(app, list(arguments))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return (found[0] if found else None), result.output


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """This file is loaded by its path, and a group is found by its module's name."""
    import sys

    monkeypatch.setitem(sys.modules, __name__, sys.modules.get(__name__) or _this_module())


def _this_module() -> Any:
    import types

    module = types.ModuleType(__name__)
    module.__dict__.update(globals())
    return module


def test_values_are_read_by_the_types_of_the_fields() -> None:
    sampling, _ = run(
        *(
            "--prompt",
            "a lake",
            "--steps",
            "5",
            "--rate",
            "30000/1001",
            "--colors",
            "none",
            "--lengths",
            "3,4",
            "--fast",
        )
    )
    assert sampling == Sampling(
        prompt="a lake", num_inference_steps=5, rate=Fraction(30000, 1001), colors=None, lengths=(3, 4), fast=True
    )


def test_defaults_are_those_of_the_class() -> None:
    assert run("--prompt", "a lake")[0] == Sampling(prompt="a lake")


def test_a_field_may_come_from_the_commands_own_parameter() -> None:
    assert run("--prompt", "a lake", "--seed", "11", also=["seed"])[0].seed == 11


def test_only_what_was_typed_is_handed_over_where_other_values_come_from_elsewhere() -> None:
    assert run("--steps", "5", only_given=True)[0] == {"num_inference_steps": 5}
    assert run(only_given=True)[0] == {}


def test_a_field_without_a_default_is_required() -> None:
    _, output = run("--steps", "5")
    assert "--prompt" in output and "Missing" in output


def test_help_shows_the_words_of_the_fields_and_no_others() -> None:
    _, output = run("--help")
    for words in ("--steps", "Denoising steps.", "Colours, or none.", "Speed"):
        assert words in output
    assert "hidden" not in output
    assert "--fast" not in run("--help", without=["fast"])[1]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--steps", "0"), "--steps must be an int of at least 1, got 0"),
        (("--rate", "1/0"), "--rate must be a number or a fraction, such as 30000/1001 or none, got '1/0'"),
        (("--colors", "pink"), "--colors must be one of adain, wavelet or none, got 'pink'"),
        (("--lengths", "3;4"), "--lengths must be numbers with commas between, got '3;4'"),
    ],
)
def test_wrong_values_name_the_option(arguments: tuple[str, ...], words: str) -> None:
    with pytest.raises(ValueError) as error:
        run("--prompt", "a lake", *arguments)
    assert words in str(error.value)


def test_fields_are_changed_by_name() -> None:
    sampling = Sampling(prompt="a lake")
    assert changed(sampling, {"num_inference_steps": 3}) == Sampling(prompt="a lake", num_inference_steps=3)
    assert changed(sampling, {}) == sampling
    with pytest.raises(TypeError, match="unexpected argument 'num_steps'; known: prompt, num_inference_steps"):
        changed(sampling, {"num_steps": 3})
    with pytest.raises(ValueError, match="num_inference_steps must be an int of at least 1, got 0"):
        changed(sampling, {"num_inference_steps": 0})
