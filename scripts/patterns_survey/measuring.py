"""Images and errors of the settings in a cell, one JSON for each, written after every prompt: a stopped run goes on."""

import re
import statistics
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tqdm import tqdm

from diffattn.files.writing import write_json
from diffattn.measure import hardware

from .cells import Cell, Stage, read_json
from .settings import Setting, Solved

VERSIONS = ("torch", "diffusers", "diffattn")
VECTORS = ("avx512_vnni", "avx512f", "avx2", "avx")
"""Of a processor's flags the widest counts."""


def machine() -> dict[str, Any]:
    """What figures depend on."""
    own = hardware()
    return {
        "cpu": own["cpu"],
        "vectors": vectors(),
        "cores": own["cores"],
        "python": own["python"],
        **{name: version(name) for name in VERSIONS},
    }


def vectors() -> str:
    """The widest vector instructions of the processor, where the system tells them."""
    info = Path("/proc/cpuinfo")
    flags = re.search(r"^flags\s*:(.*)$", info.read_text(), re.MULTILINE) if info.is_file() else None
    known = flags[1].split() if flags else []
    return next((name for name in VECTORS if name in known), "")


def file_of(runs: Path, cell: Cell, setting: Setting, kind: str = "") -> Path:
    """Where a setting's figures are; of `kind` "time" or "distilled" those."""
    return runs / cell.name / f"{slug(setting.name)}{kind and '.'}{kind}.json"


def slug(name: str) -> str:
    """A setting's name as a name of files."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


FAILURES = (ValueError, TypeError, RuntimeError, NotImplementedError)
"""Of one setting, which is recorded with them; the others go on."""


def opened(path: Path, facts: dict[str, Any]) -> dict[str, Any]:
    """The record of a setting to go on with: what is there, or an empty one where it was of other options.

    Raises `ValueError` where it is another machine's.
    """
    former, own = read_json(path), machine()
    same = ("mechanism", "reuse", "steps", "minutes", "changes")
    if any(former.get(key) != facts.get(key) for key in same):
        return {**facts, "machine": own}
    if former["machine"] != own:
        changed = [key for key in own if former["machine"].get(key) != own[key]]
        raise ValueError(
            f"{path} was measured with {changed[0]} {former['machine'].get(changed[0])}, and this is "
            f"{own[changed[0]]}: give another folder by --runs"
        )
    return {**former, **facts}


def measure(cell: Cell, settings: Sequence[Setting], count: int, runs: Path) -> None:
    """PSNR and errors of every setting that this version has, prompt by prompt."""
    stage = Stage(cell, runs / cell.name / "teacher")
    for number in tqdm(range(count), desc="full attention", disable=None):
        stage.teacher(number)
    for setting in settings:
        solved = setting.solve(cell)
        path = file_of(runs, cell, setting)
        record = opened(path, solved.facts)
        write_json(path, record)
        if solved.found.mechanism is not None:
            _measure(stage, solved, record, path, count)
        tqdm.write(f"{cell.name}: {setting.name}: {line(record)}")


def _measure(stage: Stage, solved: Solved, record: dict[str, Any], path: Path, count: int) -> None:
    """What is missing of one setting; a setting that fails is recorded with the reason, and tried again later."""
    record.pop("failed", None)
    for number in tqdm(range(count), desc=solved.setting.name, leave=False, disable=None):
        try:
            _one_prompt(stage, solved, record, number)
        except FAILURES as error:
            record["failed"] = reason(error)
            write_json(path, record)
            return
        write_json(path, record)


def _one_prompt(stage: Stage, solved: Solved, record: dict[str, Any], number: int) -> None:
    key, teacher = str(number), None
    if key not in record.setdefault("psnr", {}):
        teacher = stage.teacher(number)
        with solved.method.on(stage.pipe):
            record["psnr"][key] = round(stage.nearness(stage.draw(number, teacher.start), teacher), 3)
    if solved.reuse > 1 or key in record.setdefault("error", {}) or record.get("no_error"):
        return
    try:
        with solved.method.on(stage.pipe):
            found = stage.errors(teacher or stage.teacher(number))
    except FAILURES as error:  # of what needs a pipeline around the model
        record["no_error"] = reason(error)
    else:
        record["error"][key] = [round(value, 6) for value in found]


def reason(error: Exception) -> str:
    """An error in one line."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def line(record: dict[str, Any]) -> str:
    """What a setting came to, in words."""
    if record["mechanism"] is None or "failed" in record:
        return str(record.get("failed", record["note"]))
    if not record.get("psnr"):
        return f"{record['mechanism']}, reuse {record['reuse']}: nothing to measure"
    middle = statistics.median(record["psnr"].values())
    return f"{record['mechanism']}, reuse {record['reuse']}: share {record['share']:.3f}, {middle:.1f} dB"
