"""The doors in a checkout, and the wheel: `pipelines/` and `distill/` must arrive inside the package, complete."""

import os
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

import diffattn
import diffattn.distill
import diffattn.pipelines

ROOT = Path(__file__).resolve().parents[1]
DOORS = ("pipelines", "distill")

WALK = """
import importlib, pkgutil, sys
import diffattn
for found in pkgutil.walk_packages(diffattn.__path__, "diffattn."):
    if not found.name.endswith("__main__"):
        module = importlib.import_module(found.name)
        print(found.name, module.__file__)
"""

DRAW = """
import diffattn, torch
from diffusers import FluxPipeline

for name in diffattn.tiny.NATIVE:
    assert (diffattn.tiny.path(name) / "model_index.json").is_file(), name
pipe = FluxPipeline.from_pretrained(diffattn.tiny.path("flux"))
diffattn.apply(pipe, "clear", radius=4)
call = diffattn.tiny.defaults("flux") | {"num_inference_steps": 1}
print(pipe("a red circle", **call).images[0].size)
"""


def tree(folder: str) -> set[str]:
    """Files below a folder of the checkout, without caches, as paths from the root."""
    files = (file for file in (ROOT / folder).rglob("*") if file.is_file())
    return {str(file.relative_to(ROOT)) for file in files if "__pycache__" not in file.parts}


def modules(names: set[str]) -> set[str]:
    """Dotted names of the Python files among paths below a folder that holds `diffattn/`."""
    dotted = (
        name.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for name in names if name[-3:] == ".py"
    )
    return {name for name in dotted if not name.endswith("__main__")}


@pytest.mark.parametrize("door", DOORS)
def test_the_doors_lead_to_the_root_folders(door: str) -> None:
    assert str(ROOT / door) in getattr(diffattn, door).__path__
    assert not (ROOT / door / "__init__.py").exists(), "the package's __init__.py is the one in diffattn/"
    assert tree(f"diffattn/{door}") == {f"diffattn/{door}/__init__.py"}, "what lies beside the door hides its namesakes"
    strays = {file for file in tree(door) if file.count("/") == 1 and not file.endswith((".py", "README.md"))}
    assert not strays, "importlib.resources finds data files in subpackages only"


def test_the_lowest_versions_are_those_that_are_tested() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = [Requirement(line) for line in [*project["dependencies"], *project["optional-dependencies"]["train"]]]
    pins = (line for line in (ROOT / "constraints-lowest.txt").read_text().splitlines() if "==" in line)
    tested = {pin.name: pin.specifier for pin in map(Requirement, pins)}
    bounds = {each.name: next(iter(each.specifier)).version for each in asked if each.name in tested}
    assert set(bounds) == {*(Requirement(line).name for line in project["dependencies"]), "peft"}
    for name, lowest in bounds.items():
        (pin,) = tested[name]
        if name == "torch":  # no lower one without CUDA
            assert Version(pin.version) >= Version(lowest)
        else:
            assert Version(pin.version) == Version(lowest), name


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from the source distribution."""
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an environment with the wheel, and with everything else from the environment of the tests."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder)
    python = folder / "bin" / "python"
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*install, str(wheel)], check=True)
    # A path that a .pth file adds is not searched for .pth files itself, so an editable install there stays unseen.
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "everything_else.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


def run(python: Path, *arguments: str) -> str:
    """What a Python prints that is started far from the checkout."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    command = [str(python), *arguments]
    result = subprocess.run(command, cwd=python.parent, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.slow
def test_the_wheel_holds_the_tree_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
    expected = tree("diffattn") | {f"diffattn/{file}" for door in DOORS for file in tree(door)}
    assert held == expected - {f"diffattn/{door}/README.md" for door in DOORS}
    assert "diffattn/py.typed" in held


@pytest.mark.slow
def test_every_module_of_the_wheel_can_be_imported(installed: Path) -> None:
    found = dict(line.split(" ", 1) for line in run(installed, "-c", WALK).splitlines())
    inside = str(installed.parents[1])
    assert {name: path for name, path in found.items() if not path.startswith(inside)} == {}
    expected = modules(tree("diffattn") | {f"diffattn/{file}" for door in DOORS for file in tree(door)})
    assert set(found) | {"diffattn"} == expected


@pytest.mark.slow
def test_the_wheel_draws_by_a_bundled_pipeline(installed: Path) -> None:
    assert run(installed, "-W", "ignore", "-c", DRAW).splitlines()[-1] == "(128, 128)"


@pytest.mark.slow
def test_the_command_line_of_the_wheel_answers(installed: Path) -> None:
    if not (ROOT / "diffattn" / "__main__.py").exists():
        pytest.skip("the command line is not built yet")
    assert "diffattn" in run(installed, "-m", "diffattn", "--help")
    script = subprocess.run(
        [str(installed.with_name("diffattn")), "--help"], capture_output=True, text=True, check=True
    )
    assert "diffattn" in script.stdout
