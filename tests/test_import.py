"""What `import diffattn` and `diffattn --help` load, and what the package's names are."""

import ast
import inspect
import json
import subprocess
import sys
from pathlib import Path

import pytest

import diffattn

ROOT = Path(__file__).resolve().parents[1]
HEAVY = {"accelerate", "diffusers", "numpy", "PIL", "torch", "torchao", "transformers"}
LOADED = "print(json.dumps(sorted({name.split('.')[0] for name in sys.modules})))"


def loaded_by(program: str) -> set[str]:
    """Top-level modules that a fresh process has after `program`, by the last line that it prints."""
    arguments = [sys.executable, "-c", f"import json, sys\n{program}\n{LOADED}"]
    result = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stderr == ""
    return set(json.loads(result.stdout.splitlines()[-1]))


def test_importing_the_library_loads_nothing_heavy() -> None:
    assert not HEAVY & loaded_by("import diffattn")


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["no-such-command"]])
def test_the_list_of_commands_needs_nothing_heavy(arguments: list[str]) -> None:
    assert not HEAVY & loaded_by(
        f"import contextlib, io\nfrom diffattn.cli import main\nwith contextlib.suppress(SystemExit), "
        f"contextlib.redirect_stderr(io.StringIO()):\n    main({arguments})"
    )


def test_every_public_name_is_there_and_is_the_one_that_checkers_see() -> None:
    seen = {}
    for node in ast.walk(ast.parse(Path(inspect.getfile(diffattn)).read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            seen |= {alias.name: node.module for alias in node.names}
    assert sorted(seen) == sorted(diffattn.__all__) == sorted(set(diffattn.__all__))
    for name, module in seen.items():
        home = f"diffattn.{module}" if module else "diffattn"
        assert getattr(diffattn, name) is getattr(sys.modules[home], name), name
    assert set(diffattn.__all__) < set(dir(diffattn))


def test_parts_are_attributes_and_other_names_are_not() -> None:
    assert diffattn.measure.psnr is sys.modules["diffattn.measure"].psnr
    assert diffattn.families.describe is diffattn.describe
    for module in (diffattn, diffattn.families):
        with pytest.raises(AttributeError, match="no attribute 'aply'"):
            module.aply  # noqa: B018


@pytest.mark.slow
@pytest.mark.parametrize("module", ["config", "comparison.setting", "swap.settings.recipe", "adapters.files"])
def test_mechanisms_are_known_whatever_is_imported_first(module: str) -> None:
    program = f"import diffattn.{module}\nfrom diffattn.config import lookup, registered\nassert 'vsa' in registered()"
    assert "torch" in loaded_by(f"{program}\nassert lookup('clear').__name__ == 'ClearAttention'")


@pytest.mark.slow
def test_a_name_of_the_librarys_own_is_taken_before_anything_is_used() -> None:
    program = """
from dataclasses import dataclass
from diffattn import register
@dataclass(frozen=True)
class Clear: ...
try:
    register("clear")(Clear)
except ValueError as error:
    assert "taken" in str(error)
else:
    raise AssertionError
"""
    loaded_by(program)
