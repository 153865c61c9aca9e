"""The registry of mechanisms and their configs as dicts and JSON."""

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import pytest

from diffattn import config

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def own_registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a test registers is forgotten after it."""
    config.registered()
    monkeypatch.setattr(config, "_registry", dict(config._registry))
    yield


@dataclass(frozen=True, kw_only=True)
class Stripes:
    type: ClassVar[str]
    width: int
    gaps: tuple[int, ...] = (1, 2)
    inner: Any = None


@pytest.fixture
def stripes() -> type[Stripes]:
    return config.register("stripes")(Stripes)


def test_the_library_registers_its_own() -> None:
    known = config.registered()
    assert {"softmax", "clear"} <= set(known)
    assert list(known) == sorted(known)
    assert all(cls.type == name for name, cls in known.items())


def test_the_list_of_known_ones_is_a_copy() -> None:
    config.registered().clear()
    assert "softmax" in config.registered()


def test_a_decorated_class_is_found_and_carries_its_name(stripes: type[Stripes]) -> None:
    assert config.lookup("stripes") is stripes is Stripes
    assert stripes.type == "stripes"
    assert config.create("stripes", width=3) == Stripes(width=3)


def test_registering_twice_is_fine_but_taking_a_name_is_not(stripes: type[Stripes]) -> None:
    config.register("stripes")(stripes)

    @dataclass(frozen=True)
    class Other:
        pass

    with pytest.raises(ValueError, match=r"the name 'stripes' is taken by .*Stripes"):
        config.register("stripes")(Other)
    assert config.lookup("stripes") is stripes


def test_only_dataclasses_are_registered() -> None:
    class Plain:
        pass

    with pytest.raises(TypeError, match="Plain .*dataclass"):
        config.register("plain")(Plain)


def test_unknown_names_are_answered_with_the_known_and_the_nearest() -> None:
    with pytest.raises(
        ValueError, match=r"unknown mechanism 'sofmax'; known: .*clear.*softmax.*Did you mean 'softmax'\?"
    ):
        config.lookup("sofmax")
    with pytest.raises(ValueError) as error:
        config.lookup("qqqqqqqq")
    assert "Did you mean" not in str(error.value)


def test_unknown_options_are_answered_with_the_known_and_the_nearest(stripes: type[Stripes]) -> None:
    with pytest.raises(
        ValueError, match=r"stripes has no option 'widht'; its options: width, gaps, inner\..*'width'\?"
    ):
        config.create("stripes", widht=3)


def test_missing_options_are_named(stripes: type[Stripes]) -> None:
    with pytest.raises(ValueError, match="stripes needs width"):
        config.create("stripes", gaps=(1,))


def test_every_known_mechanism_survives_json() -> None:
    options: dict[str, dict[str, Any]] = {
        "clear": {"radius": 8, "down_factor": 4, "radius_t": 2.5},
        "hybrid": {"base": "routing(share=0.3)"},
        "per_head": {"mechanisms": "agent,clear(radius=8,pool=2)", "heads": (1, 0, 0)},
    }
    for name, cls in config.registered().items():
        required = {
            f.name: 4
            for f in dataclasses.fields(cls)
            if f.init and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        }
        mechanism = config.create(name, **(required | options.get(name, {})))
        text = config.to_json(mechanism)
        assert json.loads(text)["type"] == name
        again = config.from_json(text)
        assert again == mechanism
        assert type(again) is cls


def test_tuples_and_nested_configs_survive_json(stripes: type[Stripes]) -> None:
    mechanism = stripes(width=3, gaps=(4, 5), inner=stripes(width=1, inner=(stripes(width=2), "x")))
    text = config.to_json(mechanism)
    assert json.loads(text)["inner"]["inner"][0] == {"type": "stripes", "width": 2, "gaps": [1, 2], "inner": None}
    assert config.from_json(text) == mechanism


def test_fields_that_are_no_options_stay_out() -> None:
    @config.register("counted")
    @dataclass(frozen=True, kw_only=True)
    class Counted:
        type: ClassVar[str]
        width: int
        area: int = field(default=0, init=False)

        def __post_init__(self) -> None:
            object.__setattr__(self, "area", self.width**2)

    with pytest.raises(ValueError, match="no option 'area'"):
        config.create("counted", width=3, area=9)
    assert config.to_dict(Counted(width=3)) == {"type": "counted", "width": 3}
    assert config.from_json(config.to_json(Counted(width=3))) == Counted(width=3)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"width": 3}, r"""needs a "type", got the keys \['width'\]"""),
        ({"type": "stripes", "width": 3, "hight": 2}, "no option 'hight'"),
        ({"type": "stripes"}, "needs width"),
        ({"type": "stripe", "width": 3}, "Did you mean 'stripes'"),
    ],
)
def test_wrong_dicts_are_refused(stripes: type[Stripes], values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config.from_dict(values)


def install(folder: Path, name: str, module: str, attribute: str = "Pattern") -> None:
    """Lay a distribution out as pip would: a module and its metadata."""
    metadata = folder / f"{name}-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(f"[diffattn.mechanisms]\n{name} = {name}_attention:{attribute}\n")
    (folder / f"{name}_attention.py").write_text(module)


PLAIN = """
from dataclasses import dataclass
from diffattn.mechanisms import Mechanism

@dataclass(frozen=True, kw_only=True)
class Pattern(Mechanism):
    width: int
"""
DECORATED = PLAIN.replace("@dataclass", "from diffattn import register\n\n@register('dots')\n@dataclass")


@pytest.mark.slow
def test_installed_distributions_add_mechanisms(tmp_path: Path) -> None:
    install(tmp_path, "stripes", PLAIN)
    install(tmp_path, "dots", DECORATED)
    program = """
import sys
from diffattn import config

assert not {"stripes_attention", "dots_attention"} & set(sys.modules)
for name in ("stripes", "dots"):
    print(config.lookup(name).__module__, config.to_json(config.create(name, width=3)))
"""
    result = run(program, tmp_path)
    assert result.stdout.splitlines() == [
        'stripes_attention {"type": "stripes", "width": 3}',
        'dots_attention {"type": "dots", "width": 3}',
    ], result.stderr


@pytest.mark.slow
def test_a_broken_distribution_is_named(tmp_path: Path) -> None:
    install(tmp_path, "stripes", PLAIN, attribute="Absent")
    result = run("from diffattn import config\nconfig.lookup('stripes')", tmp_path)
    assert result.returncode != 0
    assert "stripes_attention" in result.stderr
    assert "Absent" in result.stderr


def run(program: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """A fresh Python that sees the distributions in `folder` as installed."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)])}
    command = [sys.executable, "-c", program]
    return subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, check=False)
