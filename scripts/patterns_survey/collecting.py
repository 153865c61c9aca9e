"""All figures of a folder of runs as one table of values, `docs/patterns.json`: one line for each setting of a cell."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffattn.files.writing import write_text

from .cells import CELLS, read_json

OF_TRAINING = ("minutes", "steps_trained", "batch", "changes")
FACTS = ("setting", "kind", "mechanism", "reuse", "share", "gflops", "note", "failed")


def collect(runs: Path, file: Path, order: Sequence[str]) -> dict[str, Any]:
    """The values of `file` with those of the runs in their places, written again; settings in `order`."""
    values = read_json(file) or {"cells": {}}
    for name, cell in CELLS.items():
        former = values["cells"].get(name, {"settings": []})
        rows = {row["setting"]: row for row in former["settings"]}
        steps = former.get("steps", cell.steps)
        for path in sorted((runs / name).glob("*.json")):
            if path.name.count(".") > 1 or (record := read_json(path)).get("setting") not in order:
                continue
            _check_machine(values, record, path)
            steps = record["steps"]
            rows[record["setting"]] = _row(record, path)
        if rows:
            listed = [rows[setting] for setting in order if setting in rows]
            otherwise = _otherwise(values, runs / name, order) or former.get("otherwise", [])
            values["cells"][name] = {"steps": steps, "budget": cell.budget, "settings": listed}
            values["cells"][name] |= {"otherwise": otherwise} if otherwise else {}
    write_text(file, as_text(values))
    return values


def _otherwise(values: dict[str, Any], folder: Path, order: Sequence[str]) -> list[dict[str, Any]]:
    """Settings that were trained in other ways than that of the table."""
    found = []
    for path in sorted(folder.glob("*.otherwise-*.json")):
        record = read_json(path)
        if record.get("psnr"):
            _check_machine(values, record, path)
            row = {key: record[key] for key in (*FACTS, *OF_TRAINING) if record.get(key) not in (None, "")}
            found.append(row | _figures(record))
    return sorted(found, key=lambda row: (order.index(row["setting"]), row.get("changes", []), row["share"]))


def _check_machine(values: dict[str, Any], record: dict[str, Any], path: Path) -> None:
    """Raise where a record is of another machine than those before."""
    own = values.setdefault("machine", record["machine"])
    if own != record["machine"]:
        changed = [key for key in own if own[key] != record["machine"].get(key)]
        raise ValueError(
            f"{path} has {changed[0]} {record['machine'].get(changed[0])}, and the others have {own[changed[0]]}: "
            "measure all of it on one machine, or begin docs/patterns.json anew"
        )


def _row(record: dict[str, Any], path: Path) -> dict[str, Any]:
    row = {key: record[key] for key in FACTS if record.get(key) not in (None, "")}
    row.update(_figures(record))
    time = read_json(path.with_suffix(".time.json"))
    if time.get("mechanism") == record["mechanism"] and "seconds" in time:
        kept = ("seconds", "full_seconds", "parts_seconds", "threads")
        row.update({key: time[key] for key in kept if key in time})
    distilled = read_json(path.with_suffix(".distilled.json"))
    if distilled.get("mechanism") == record["mechanism"] and "psnr" in distilled:
        row["distilled"] = _figures(distilled) | {key: distilled[key] for key in ("minutes", "steps_trained", "batch")}
    return row


def _figures(record: dict[str, Any]) -> dict[str, Any]:
    """Values of each prompt, in the order of the prompts."""
    found: dict[str, Any] = {}
    for key in ("psnr", "error"):
        if record.get(key):
            found[key] = [value for _, value in sorted(record[key].items(), key=lambda own: int(own[0]))]
    return found


def as_text(values: dict[str, Any]) -> str:
    """JSON with a line for each setting."""
    lines = ["{", f' "machine": {json.dumps(values.get("machine", {}))},', ' "cells": {']
    for number, (name, cell) in enumerate(values["cells"].items()):
        head = {key: value for key, value in cell.items() if key not in ("settings", "otherwise")}
        lines.append(f'  "{name}": {json.dumps(head)[:-1]}, "settings": [')
        lines.append(_listed(cell["settings"]))
        if cell.get("otherwise"):
            lines += ['  ], "otherwise": [', _listed(cell["otherwise"])]
        lines.append("  ]}" + ("," if number + 1 < len(values["cells"]) else ""))
    return "\n".join([*lines, " }", "}"]) + "\n"


def _listed(rows: Sequence[dict[str, Any]]) -> str:
    return ",\n".join(f"   {json.dumps(row, allow_nan=False)}" for row in rows)
