"""Cases recorded from the official implementations: one JSON file each, its tensors in safetensors beside it.

    @pytest.mark.golden
    @pytest.mark.parametrize("case", golden_cases("clear"))
    def test_clear(case):
        tensors = case.tensors()
        assert_golden("out", attention(tensors["q"], ...), tensors["out"], case.tolerance)

The cases are read from `tests/golden/<system>`, or from `$DIFFATTN_GOLDEN/<system>` for a further set. A test computes
with all that a case says: what it did not ask for, of the config or of the tensors, fails it (`check_used`, which
`conftest.py` calls after each golden test).
"""

import fnmatch
import functools
import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_record import Path as Asked
from golden_record import Record
from safetensors.torch import load_file, save_file
from torch import Tensor

OWN_SET = Path(__file__).parent / "golden"

NOT_CASES = ("index.json", "*config.json", "*_weights.json", "*.index.json")
"""JSON files that belong to a set without being cases."""

BOOKKEEPING = (
    "tolerance",
    "tensors",
    "files",
    "omit",
    "bytes",
    "collectives",
    "world_size_invariant",
    "*max_abs_diff*",
)
"""What a case says of its recording, beside words: not what was computed. Patterns of keys of the whole JSON."""

LATER: dict[tuple[str, str], str] = {}
"""(system, kind) of cases whose subject is still to come, and the reason they are skipped with."""


@dataclass(frozen=True)
class GoldenCase:
    """One JSON file of a golden set."""

    path: Path

    @property
    def system(self) -> str:
        return self.path.parent.name

    @property
    def name(self) -> str:
        return self.path.stem

    def __reduce__(self) -> Any:
        """A copy in another process asks anew."""
        return GoldenCase, (self.path,)

    @functools.cached_property
    def asked(self) -> set[Asked]:
        """Paths of all that was asked for, of the JSON and (under "tensor") of the tensors."""
        return set()

    @functools.cached_property
    def spec(self) -> Record:
        """The whole JSON."""
        return Record(json.loads(self.path.read_text()), self.asked)

    @property
    def config(self) -> Record:
        return self.spec.get("config") or Record({})

    @property
    def kind(self) -> str | None:
        return self.spec.get("kind") or self.config.get("kind")

    @property
    def tolerance(self) -> dict[str, Any]:
        return self.spec["tolerance"].plain() if "tolerance" in self.spec else {}

    def tensors(self) -> Record:
        """The tensors of `<name>.safetensors`, or of its parts `<name>-0.safetensors`, `<name>-1.safetensors`, ..."""
        if not self._tensors:
            raise FileNotFoundError(f"{self.path} has no tensors beside it")
        return self._tensors

    @functools.cached_property
    def _tensors(self) -> Record:
        part = re.compile(re.escape(self.name) + r"(-\d+)?\.safetensors")
        files = [file for file in sorted(self.path.parent.iterdir()) if part.fullmatch(file.name)]
        found = {key: tensor for file in files for key, tensor in load_file(file).items()}
        return Record(found, self.asked, ("tensor",))

    def check_used(self) -> None:
        """Fail for keys of the JSON and for tensors that nobody asked for."""
        spec = self.spec
        spec.told(*(key for key in spec if spec.is_text(key) or any(fnmatch.fnmatch(key, own) for own in BOOKKEEPING)))
        check_nothing_left(self.path.name, spec, self._tensors)


def check_nothing_left(name: str, *records: Record) -> None:
    left = [key for record in records for key in record.left()]
    assert not left, f"{name} says what this test does not use: {left}"


def run_golden(test: Callable[[Any], None], case: Any) -> None:
    """A golden test as pytest runs it: it fails too where the case says more than the test used."""
    test(case)
    case.check_used()


def write_case(folder: Path, name: str, spec: dict[str, Any], tensors: Mapping[str, Tensor]) -> GoldenCase:
    """A case of one's own; its folder is named as its system."""
    folder.mkdir(parents=True, exist_ok=True)
    described = {key: [list(tensor.shape), str(tensor.dtype)] for key, tensor in tensors.items()}
    (folder / f"{name}.json").write_text(json.dumps({"tolerance": OWN_TOLERANCE, **spec, "tensors": described}))
    if tensors:
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / f"{name}.safetensors")
    return GoldenCase(folder / f"{name}.json")


def with_a_key_more(system: str, name: str, folder: Path, *inside: str) -> GoldenCase:
    """A copy of an own case whose config, or the object `inside` it, has a key that no test knows."""
    case = GoldenCase(OWN_SET / system / f"{name}.json")
    spec = json.loads(case.path.read_text())
    place = functools.reduce(lambda value, key: value[key], inside, spec.get("config", spec))
    place["surprise"] = 1
    return write_case(folder / system, name, spec, case._tensors.plain())


OWN_TOLERANCE = {"atol": 2e-5, "rtol": 1e-4}
"""Of cases whose results come from float64 and are compared with float32."""


def golden_cases(system: str) -> list[Any]:
    """Parameters `<system>/<file name>` for `pytest.mark.parametrize`: all cases of a system.

    No case at all is an error, so that a wrong path can't pass for success. Only a further set (`$DIFFATTN_GOLDEN`)
    may lack a whole system: that gives one skipped parameter which says so.
    """
    root = golden_root()
    folder = root / system
    if not folder.is_dir():
        if root == OWN_SET or not any(list_cases(child) for child in root.iterdir() if child.is_dir()):
            raise FileNotFoundError(f"no golden cases: {root} should have a folder {system!r} of JSON files")
        reason = f"the golden set in {root} has no cases of {system}"
        return [pytest.param(None, id=f"{system}/absent", marks=pytest.mark.skip(reason=reason))]
    cases = list_cases(folder)
    if not cases:
        raise FileNotFoundError(f"no golden cases: {folder} holds no case, {NOT_CASES} left out")
    return [pytest.param(case, id=f"{system}/{case.path.name}", marks=later(case)) for case in cases]


def golden_root() -> Path:
    """The folder of the golden set in use."""
    named = os.environ.get("DIFFATTN_GOLDEN")
    if not named:
        return OWN_SET
    root = Path(named).expanduser().resolve()
    if not root.is_dir():
        raise NotADirectoryError(f"DIFFATTN_GOLDEN must name a folder with one folder for each system, got {named!r}")
    return root


def list_cases(folder: Path) -> list[GoldenCase]:
    files = sorted(folder.glob("*.json"))
    return [GoldenCase(file) for file in files if not any(fnmatch.fnmatch(file.name, other) for other in NOT_CASES)]


def later(case: GoldenCase) -> list[pytest.MarkDecorator]:
    reasons = [reason for (system, kind), reason in LATER.items() if (system, kind) == (case.system, case.kind)]
    return [pytest.mark.skip(reason=reason) for reason in reasons]


def of_float32(tolerance: Mapping[str, Any]) -> dict[str, Any]:
    """For schedules that were recorded from a chain of float32 operations: its error on another CPU, 1e-5, at least."""
    return {**tolerance, "atol": max(1e-5, float(tolerance.get("atol", 0.0)))}


def assert_golden(name: str, got: Tensor, want: Tensor, tolerance: Mapping[str, Any]) -> None:
    """Compare with a recorded tensor, shape and dtype included, by the `atol` and `rtol` recorded with it.

    Where the set gives a `u8_atol`, images of bytes may differ by that many steps.
    """
    if want.dtype == torch.uint8 and "u8_atol" in tolerance:
        atol, rtol = float(tolerance["u8_atol"]), 0.0
        got, want = got.to(torch.int16) if got.dtype == torch.uint8 else got, want.to(torch.int16)
    else:
        atol, rtol = float(tolerance["atol"]), float(tolerance["rtol"])
    torch.testing.assert_close(got, want, atol=atol, rtol=rtol, msg=lambda text: f"{name}: {text}")
