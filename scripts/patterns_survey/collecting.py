"""All figures of a folder of runs as one table of values, `docs/patterns.json`: one line for each setting of a cell.

Machines are numbered there. Images and errors may come from several, as long as the versions of torch and diffusers are
the same; a time, and how many steps fit into minutes, name theirs by `machine`, which is 1 where it is left out.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffattn.files.writing import write_text

from .cells import CELLS, read_json
from .measuring import slug

TIME = ("seconds", "full_seconds", "parts_seconds", "threads", "time_machine")
OF_TRAINING = ("minutes", "steps_trained", "batch", "changes")
SAME = ("python", "torch", "diffusers", "diffattn")
"""Of two machines whose figures stand in one table."""
FACTS = ("setting", "kind", "mechanism", "reuse", "share", "gflops", "note", "failed")
ORDER = (*FACTS, "psnr", "error", "machine", *TIME, "distilled")
"""Of a row's keys, so that the same figures are the same lines."""


def collect(runs: Path, file: Path, order: Sequence[str]) -> dict[str, Any]:
    """The values of `file` with those of the runs in their places, written again; settings in `order`.

    What the runs do not have stays: a setting's time may come from one folder, and its training from another.
    """
    values = read_json(file) or {"cells": {}}
    for name, cell in CELLS.items():
        former = values["cells"].get(name, {"settings": []})
        known = {row["setting"]: row for row in former["settings"]}
        found = [_row(values, runs / name / f"{slug(setting)}.json", known.get(setting, {})) for setting in order]
        if rows := [row for row in found if row]:
            steps = former.get("steps") or _steps(runs / name) or cell.steps
            values["cells"][name] = {"steps": steps, "budget": cell.budget, "settings": rows}
            otherwise = _otherwise(values, runs / name, former.get("otherwise", []), order)
            values["cells"][name] |= {"otherwise": otherwise} if otherwise else {}
    write_text(file, as_text(values))
    return values


def _steps(folder: Path) -> int | None:
    return next((read_json(path)["steps"] for path in sorted(folder.glob("*.json"))), None)


def _row(values: dict[str, Any], path: Path, former: dict[str, Any]) -> dict[str, Any]:
    """A setting's row, of former figures and those of its files; empty where nothing is known of it."""
    row, record = dict(former), read_json(path)
    if record:
        own = {key: record[key] for key in FACTS if record.get(key) not in (None, "")}
        own |= _figures(record) | _machine(values, record, path)
        same = former.get("mechanism") == record["mechanism"]
        row = own | {key: former[key] for key in (*TIME, "distilled") if same and key in former}
    mechanism = row.get("mechanism")
    time, distilled = (read_json(path.with_suffix(f".{kind}.json")) for kind in ("time", "distilled"))
    if mechanism and time.get("mechanism") == mechanism and "seconds" in time:
        row = {key: value for key, value in row.items() if key not in TIME}
        number = _machine(values, time, path).get("machine")
        row |= {key: time[key] for key in TIME if key in time} | ({"time_machine": number} if number else {})
    if mechanism and distilled.get("mechanism") == mechanism and len(distilled.get("psnr", ())) == len(row["psnr"]):
        row["distilled"] = _trained(values, distilled, path)
    return {key: row[key] for key in ORDER if key in row}


def _trained(values: dict[str, Any], record: dict[str, Any], path: Path) -> dict[str, Any]:
    kept = {key: record[key] for key in OF_TRAINING if key in record}
    return _figures(record) | kept | _machine(values, record, path)


def _otherwise(
    values: dict[str, Any], folder: Path, former: Sequence[dict[str, Any]], order: Sequence[str]
) -> list[dict[str, Any]]:
    """Settings that were trained in other ways than that of the table."""
    found = {_way(row): row for row in former}
    for path in sorted(folder.glob("*.otherwise-*.json")):
        record = read_json(path)
        if record.get("psnr"):
            row = {key: record[key] for key in FACTS if record.get(key) not in (None, "")}
            row |= _trained(values, record, path)
            found[_way(row)] = row
    return sorted(found.values(), key=lambda row: (order.index(row["setting"]), row.get("changes", []), row["share"]))


def _way(row: dict[str, Any]) -> tuple[Any, ...]:
    return (row["mechanism"], row["minutes"], *row.get("changes", ()))


def _machine(values: dict[str, Any], record: dict[str, Any], path: Path) -> dict[str, Any]:
    """Which machine a record is of, as an entry of its row; raises where its versions are others."""
    machines, own = values.setdefault("machines", []), record["machine"]
    if own not in machines:
        changed = [key for key in SAME if machines and own[key] != machines[0].get(key)]
        if changed:
            raise ValueError(
                f"{path} has {changed[0]} {own[changed[0]]}, and the others have {machines[0].get(changed[0])}: "
                "measure all of it with one version, or begin docs/patterns.json anew"
            )
        machines.append(own)
    number = machines.index(own) + 1
    return {"machine": number} if number > 1 else {}


def _figures(record: dict[str, Any]) -> dict[str, Any]:
    """Values of each prompt, in the order of the prompts."""
    found: dict[str, Any] = {}
    for key in ("psnr", "error"):
        if record.get(key):
            found[key] = [value for _, value in sorted(record[key].items(), key=lambda own: int(own[0]))]
    return found


def as_text(values: dict[str, Any]) -> str:
    """JSON with a line for each setting."""
    lines = ["{", f' "machines": {json.dumps(values.get("machines", []))},', ' "cells": {']
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
