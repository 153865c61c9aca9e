"""Options from files: `--config` and `--like`."""

import json
import math
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import typer
from typer.testing import CliRunner

from diffattn.cli.frame import App, Options
from diffattn.cli.groups import Group, taken
from diffattn.files.records import recorded, versions
from diffattn.options import Help, Must, at_least


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """As a pipeline has it."""

    prompt: Annotated[str, Help("What to show.")]
    num_inference_steps: Annotated[int, at_least(1), Help("Denoising steps.", "--steps")] = 20
    rate: Annotated[Fraction | None, Help("Frame rate.")] = None
    colors: Annotated[Literal["adain", "wavelet"] | None, Help("Colours, or none.")] = "adain"
    lengths: Annotated[tuple[int, ...] | None, Must("numbers with commas between"), Help("Of each rank.")] = None
    growth: Annotated[float | None, Help("Of a stage.")] = None
    fast: Annotated[bool, Help("Faster.")] = False


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """This file is loaded by its path, and a group is found by its module's name."""
    import sys
    import types

    module = types.ModuleType(__name__)
    module.__dict__.update(globals())
    monkeypatch.setitem(sys.modules, __name__, sys.modules.get(__name__) or module)


def run(*arguments: object) -> dict[str, Any]:
    """What the command took; a `ValueError` where it refused."""
    found: dict[str, Any] = {}
    app = App(pretty_exceptions_enable=False, rich_markup_mode="rich")

    @app.command("make", groups=[Group(f"{__name__}:Sampling")], files=["config", "like"])
    def make(
        context: typer.Context,
        model: Annotated[str, typer.Argument()],
        inputs: Annotated[list[str] | None, typer.Argument()] = None,
        mechanism: str | None = None,
        quality: str | None = None,
        adapter: str | None = None,
        option: Options = None,
        layers: Annotated[list[str] | None, typer.Option("--layers")] = None,
        radius: Annotated[list[float] | None, typer.Option(min=1.0)] = None,
        parts: Annotated[int, typer.Option(min=1)] = 3,
        judge: Annotated[bool, typer.Option("--evaluate/--no-evaluate")] = True,
        output: Annotated[Path, typer.Option("--output")] = Path("out.png"),
        overwrite: Annotated[bool, typer.Option("--overwrite")] = False,
    ) -> None:
        """Make something."""
        values = {name: value for name, value in locals().items() if name not in ("context", "found")}
        sampling = taken(context, "Sampling")
        found.update(values | vars(sampling))

    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return {**found, "said": result.stderr}


@pytest.fixture
def write(tmp_path: Path) -> Any:
    def written(text: str, name: str = "run.toml") -> Path:
        (tmp_path / name).write_text(text)
        return tmp_path / name

    return written


EVERYTHING = """
model = "tiny"
inputs = ["a.png", "b.png"]
mechanism = "clear"
option = {radius = 4, proportional = false}
layers = "blocks.*"
radius = [4, 8.5]
parts = 2
evaluate = false
output = "there.png"
prompt = "a lake"
steps = 5
rate = 29.97
colors = "wavelet"
lengths = [3, 4]
growth = inf
fast = true
"""


def test_every_kind_of_option_comes_from_a_file(write: Any) -> None:
    found = run("--config", write(EVERYTHING))
    assert (found["model"], found["mechanism"], found["layers"]) == ("tiny", "clear", ["blocks.*"])
    assert found["inputs"] == ["a.png", "b.png"] and found["radius"] == [4, 8.5]
    assert found["option"] == ["radius=4", "proportional=False"]
    assert (found["parts"], found["judge"], found["output"]) == (2, False, Path("there.png"))
    assert (found["prompt"], found["num_inference_steps"], found["rate"]) == ("a lake", 5, Fraction("29.97"))
    assert (found["colors"], found["lengths"], found["growth"], found["fast"]) == ("wavelet", (3, 4), math.inf, True)


def test_json_and_names_with_dashes_and_nothing_are_read(write: Any) -> None:
    found = run("--config", write('{"model": "m", "prompt": "x", "rate": null, "lengths": null}', "run.json"))
    assert (found["model"], found["rate"], found["lengths"], found["parts"]) == ("m", None, None, 3)
    assert run("--config", write('{"model": "m", "prompt": "x", "colors": null}', "run.json"))["colors"] is None


def test_a_mechanism_is_written_as_in_a_file_of_distill(write: Any) -> None:
    found = run("m", "--prompt", "x", "--config", write('[mechanism]\ntype = "agent"\nnum_agents = [4, 8]\n'))
    assert (found["mechanism"], found["option"]) == ("agent", ["num_agents=4,8"])


def test_what_is_typed_goes_over_the_file(write: Any) -> None:
    file = write(EVERYTHING)
    found = run("other", "--config", file, "--steps", 9, "--parts", 7, "--layers", "up.*", "--evaluate")
    assert (found["model"], found["num_inference_steps"], found["parts"]) == ("other", 9, 7)
    assert (found["layers"], found["judge"]) == (["up.*"], True)
    assert found["inputs"] == ["a.png", "b.png"] and found["prompt"] == "a lake"


def test_options_of_a_mechanism_are_kept_one_by_one_while_it_is_the_files(write: Any) -> None:
    file = write(EVERYTHING)
    assert run("--config", file, "-o", "radius=9")["option"] == ["proportional=False", "radius=9"]
    assert run("--config", file, "--mechanism", "clear", "-o", "pool=2")["option"][-1] == "pool=2"
    assert run("--config", file, "--mechanism", "agent")["option"] is None
    assert run("--config", file, "--mechanism", "agent", "-o", "num_agents=4")["option"] == ["num_agents=4"]
    other = run("--config", file, "--adapter", "mine")
    assert (other["mechanism"], other["option"], other["adapter"]) == (None, None, "mine")


def test_a_level_of_quality_goes_with_its_mechanism(write: Any) -> None:
    file = write('model = "m"\nprompt = "x"\nmechanism = "routing"\nquality = "fast"\n')
    assert run("--config", file)["quality"] == "fast"
    assert run("--config", file, "--mechanism", "routing")["quality"] == "fast"
    assert run("--config", file, "--mechanism", "clear", "-o", "radius=3")["quality"] is None
    assert run("--config", file, "--adapter", "mine")["quality"] is None
    assert run("--config", file, "--mechanism", "clear", "--quality", "high")["quality"] == "high"


def test_what_a_file_says_is_undone_by_typing(write: Any) -> None:
    file = write(EVERYTHING)
    assert run("--config", file, "--no-fast")["fast"] is False
    assert run("m", "--prompt", "x", "--no-overwrite")["overwrite"] is False
    none = run("--config", file, "--mechanism", "none")
    assert (none["mechanism"], none["option"], none["adapter"]) == (None, None, None)
    assert run("m", "--mechanism", "none", "--prompt", "x")["mechanism"] is None
    with pytest.raises(Exception, match="No such option: --no-parts"):
        run("m", "--prompt", "x", "--no-parts")


def test_a_file_of_windows_is_read(tmp_path: Path) -> None:
    for name, text in (("a.toml", 'model = "m"\r\nprompt = "ä"\r\n'), ("a.json", '{"model": "m", "prompt": "ä"}\r\n')):
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + text.encode())
        assert run("--config", tmp_path / name)["prompt"] == "ä"
    (tmp_path / "a.json").write_text('{"model": "m", "prompt": "x", "model": "n"}')
    with pytest.raises(ValueError, match="a.json is not valid JSON: 'model' is there twice"):
        run("--config", tmp_path / "a.json")
    with pytest.raises(ValueError, match="--config is there twice: give one file"):
        run("--config", tmp_path / "a.json", f"--config={tmp_path / 'a.toml'}")
    (tmp_path / "a.txt").write_text('model = "m"')
    with pytest.raises(ValueError, match="a.txt is not valid JSON: .*; a TOML file must end in .toml"):
        run("--config", tmp_path / "a.txt")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("stepz = 3", r"unknown option 'stepz' in .*run.toml of `diffattn make`; known: .* Did you mean 'steps'\?"),
        ("num_inference_steps = 3", "unknown option 'num_inference_steps'"),
        ("judge = true", "unknown option 'judge'"),
        ("config = 'a.toml'", "unknown option 'config'"),
        ("steps = '3'", "run.toml: steps must be an int of at least 1, got '3'"),
        ("steps = 0", "run.toml: steps must be an int of at least 1, got 0"),
        ("parts = 2.5", "run.toml: parts must be a whole number, got 2.5"),
        ("parts = true", "run.toml: parts must be a whole number, got True"),
        ("parts = 0", "run.toml: parts: Input should be greater than or equal to 1, got 0"),
        ("radius = [0.5]", r"run.toml: radius: Input should be greater than or equal to 1, got \[0.5\]"),
        ("radius = 'big'", "run.toml: radius must be"),
        ("layers = [3]", "run.toml: layers must be"),
        ("fast = 1", "run.toml: fast must be true or false, got 1"),
        ("output = 7", "run.toml: output must be text, got 7"),
        ("output = ''", "run.toml: output: expected the name of a file or folder, got nothing"),
        ("colors = 'red'", "run.toml: colors must be"),
        ("rate = inf", "run.toml: rate must be"),
        ("mechanism = {radius = 3}", r"run.toml: a table for mechanism needs its name as .type., got \{'radius': 3\}"),
        ("layers = 3", "run.toml: layers must be a list, got 3"),
        ("option = 5", "run.toml: option must be a list, got 5"),
        ("steps = ", "run.toml is not valid TOML"),
    ],
)
def test_wrong_files_are_refused_by_file_and_option(write: Any, text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        run("tiny", "--prompt", "x", "--config", write(text))


def test_a_file_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no config file"):
        run("tiny", "--prompt", "x", "--config", tmp_path / "absent.toml")
    with pytest.raises(ValueError, match="cannot be read: Is a directory"):
        run("tiny", "--prompt", "x", "--config", tmp_path)


@pytest.fixture
def record(tmp_path: Path) -> Path:
    options = {"model": "tiny", "prompt": "a lake", "mechanism": "clear", "option": ["radius=4"], "growth": math.inf}
    options |= {"lengths": (3, 4), "rate": Fraction(30000, 1001), "output": Path("a.png"), "overwrite": True}
    with recorded(tmp_path / "a.json", "make", options) as made:
        made["files"] = [tmp_path / "a.png"]
    return tmp_path / "a.json"


def test_like_takes_what_made_a_file_but_not_its_place(record: Path) -> None:
    for name in ("a.json", "a.png"):
        found = run("--like", record.with_name(name), "-o", "radius=5")
        assert (found["prompt"], found["option"], found["growth"]) == ("a lake", ["radius=5"], math.inf)
        assert (found["lengths"], found["rate"]) == ((3, 4), Fraction(30000, 1001))
        assert (found["output"], found["overwrite"], found["said"]) == (Path("out.png"), False, "")


def test_a_record_is_a_config_too_and_a_config_goes_over_what_is_like(record: Path, write: Any) -> None:
    assert run("--config", record)["output"] == Path("a.png")
    file = write("prompt = 'a hill'\nsteps = 4")
    for arguments in (["--config", file, "--like", record], ["--like", record, "--config", file]):
        found = run(*arguments)
        assert (found["prompt"], found["num_inference_steps"], found["mechanism"]) == ("a hill", 4, "clear")
    file = write("option = {pool = 2}\n")
    for arguments in (["--config", file, "--like", record], ["--like", record, "--config", file]):
        assert run(*arguments, "-o", "proportional=yes")["option"] == ["radius=4", "pool=2", "proportional=yes"]
    file = write("adapter = 'mine'\n")
    found = run("--like", record, "--config", file)
    assert (found["mechanism"], found["option"], found["adapter"]) == (None, None, "mine")


def test_like_says_once_where_releases_differ(record: Path) -> None:
    values = json.loads(record.read_text())
    values["versions"]["torch"] = "1.0"
    record.write_text(json.dumps(values))
    said = run("--like", record)["said"]
    assert said.count("\n") == 1 and f"was made by torch 1.0 and not {versions()['torch']}" in said


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda values: values.pop("versions"), "expected the record of an image or video"),
        (lambda values: values.update(options=3), "expected the record of an image or video"),
        (lambda values: values.update(command="upscale"), "is the record of `diffattn upscale`, and this is"),
        (lambda values: values["options"].update(stepz=3), "unknown option 'stepz'.* Did you mean 'steps'"),
        (lambda values: values["options"].update(steps="3"), "a.json: steps must be"),
    ],
)
def test_a_foreign_or_broken_record_is_refused(record: Path, change: Any, words: str) -> None:
    values = json.loads(record.read_text())
    change(values)
    record.write_text(json.dumps(values))
    with pytest.raises(ValueError, match=words):
        run("--like", record)


def test_a_record_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected a record beside .*b.png, b.json; there is none"):
        run("--like", tmp_path / "b.png")
    (tmp_path / "b.json").write_text("{")
    with pytest.raises(ValueError, match=r"b.json is not valid JSON"):
        run("--like", tmp_path / "b.png")
