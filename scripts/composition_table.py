"""Write the matrix of what a swap was tested together with into a Markdown file, from the tests themselves.

Every test in tests/composition says by `@pytest.mark.cell(feature, family=..., outcome=..., note=...)` which cell it
proves; the family may come from the parametrization. Tests of the same feature and family share a cell.

PYTHONPATH=.:tests python scripts/composition_table.py docs/composition.md [--check]
"""

import argparse
import contextlib
import io
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from models import BUILDERS

ROOT = Path(__file__).parents[1]
TESTS = ROOT / "tests" / "composition"
MARKERS = "<!-- composition matrix -->", "<!-- /composition matrix -->"
SYMBOLS = {"works": "✓", "refused": "✗", "not run": "○"}
LEGEND = "✓ works, ✗ refused by an error that says why, ○ not run here; an empty cell has no test."
ABOUT_THE_MATRIX = "test_matrix.py"
"""The one file of the folder whose tests are no cells."""


@dataclass
class Cell:
    """What the tests of one feature on one family say."""

    outcome: str
    notes: dict[str, None] = field(default_factory=dict)
    reasons: dict[str, None] = field(default_factory=dict)
    """Why tests do not run here."""
    runs: bool = False

    @property
    def symbol(self) -> str:
        return SYMBOLS[self.outcome if self.runs else "not run"]

    @property
    def remark(self) -> str:
        """For the cell's footnote, if any."""
        not_run = "partly not run here: " if self.runs else ""
        return "; ".join([*self.notes, *(f"{not_run}{reason}" for reason in self.reasons)])


Cells = dict[tuple[str, str], Cell]
"""(feature, family) -> cell, in the order of the tests."""


class Collector:
    """A pytest plugin that keeps what was collected."""

    def __init__(self) -> None:
        self.items: list[pytest.Item] = []
        self.skipped: list[str] = []

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.skipped:
            self.skipped.append(f"{report.nodeid}: {report.longrepr}")

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.items = list(session.items)


def collect(folder: Path = TESTS) -> list[pytest.Item]:
    """The tests of a folder, none of them run."""
    collector, output = Collector(), io.StringIO()
    arguments = ["--collect-only", "-q", "--assert=plain", "-p", "no:cacheprovider", "-c", str(ROOT / "pyproject.toml")]
    with contextlib.redirect_stdout(output):
        status = pytest.main([*arguments, str(folder)], plugins=[collector])
    if status != pytest.ExitCode.OK:
        raise RuntimeError(f"pytest could not collect {folder} ({status!r}):\n{output.getvalue()}")
    if collector.skipped:
        raise RuntimeError(
            f"modules that are skipped as a whole have no cells, let their tests be skipped one by one: "
            f"{'; '.join(collector.skipped)}"
        )
    return collector.items


def skip_reason(item: pytest.Item) -> str | None:
    """Why a test does not run on this machine."""
    for mark in item.iter_markers("skip"):
        return str(mark.kwargs.get("reason") or (mark.args[0] if mark.args else "no reason given"))
    for mark in item.iter_markers("skipif"):
        condition = mark.args[0] if mark.args else mark.kwargs["condition"]
        if isinstance(condition, str):
            raise ValueError(f"{item.nodeid}: the condition of skipif must be a value, got the string {condition!r}")
        if condition:
            return str(mark.kwargs["reason"])
    return None


def labels(item: pytest.Item) -> list[dict[str, Any]]:
    """What the test's markers say, checked: feature, family, outcome and note of every cell it proves."""
    parameters = getattr(getattr(item, "callspec", None), "params", {})
    found = [read_marker(item.nodeid, mark, parameters.get("family")) for mark in item.iter_markers("cell")]
    if not found:
        raise ValueError(f"{item.nodeid} needs @pytest.mark.cell(feature, family=..., outcome=...)")
    return found


def read_marker(name: str, mark: pytest.Mark, family: str | None) -> dict[str, Any]:
    """One marker's arguments; `family` is that of the parametrization."""
    label = {"family": family, "outcome": None, "note": "", **mark.kwargs}
    if len(mark.args) != 1 or len(label) > 3:
        raise ValueError(f"{name}: expected cell(feature, family=..., outcome=..., note=...), got {mark}")
    if not label["family"]:
        raise ValueError(f"{name}: cell needs family=, or a test with a parameter of that name")
    if label["outcome"] not in ("works", "refused"):
        raise ValueError(f"{name}: outcome must be 'works' or 'refused', got {label['outcome']!r}")
    if label["outcome"] == "refused" and not label["note"]:
        raise ValueError(f"{name}: a refused cell needs note=, which says why")
    return {"feature": mark.args[0], **label}


def cells_of(items: list[pytest.Item]) -> Cells:
    """The matrix; tests of one cell must agree."""
    cells: Cells = {}
    for item in items:
        if item.path.name == ABOUT_THE_MATRIX:
            continue
        reason = skip_reason(item)
        for label in labels(item):
            cell = cells.setdefault((label["feature"], label["family"]), Cell(label["outcome"]))
            if cell.outcome != label["outcome"]:
                raise ValueError(f"{item.nodeid} says {label['outcome']!r}, another test of this cell {cell.outcome!r}")
            cell.runs |= reason is None
            cell.notes |= {label["note"]: None} if label["note"] else {}
            cell.reasons |= {reason: None} if reason else {}
    return cells


def markdown(cells: Cells) -> str:
    """A row per feature, a column per family, and the remarks below."""
    known = list(BUILDERS)
    features = list(dict.fromkeys(feature for feature, _ in cells))
    families = list(dict.fromkeys(family for _, family in cells))
    families.sort(key=lambda family: known.index(family) if family in known else len(known))
    remarks: dict[str, int] = {}

    def entry(feature: str, family: str) -> str:
        cell = cells.get((feature, family))
        if cell is None or not cell.remark:
            return cell.symbol if cell else ""
        return f"{cell.symbol} ({remarks.setdefault(cell.remark, len(remarks) + 1)})"

    lines = [f"| | {' | '.join(families)} |", f"|---|{':-:|' * len(families)}"]
    lines += [f"| {feature} | {' | '.join(entry(feature, family) for family in families)} |" for feature in features]
    lines += ["", LEGEND]
    if remarks:
        lines += ["", *(f"{number}. {remark}" for remark, number in remarks.items())]
    return "\n".join(lines)


def with_matrix(text: str, matrix: str) -> str:
    """The file's text with the matrix between the markers."""
    start, end = (re.escape(marker) for marker in MARKERS)
    if not re.search(rf"{start}\n.*?{end}", text, re.DOTALL):
        raise ValueError(f"the file must hold {MARKERS[0]} and {MARKERS[1]}, each on its own line")
    return re.sub(rf"({start}\n).*?({end})", lambda match: f"{match[1]}\n{matrix}\n\n{match[2]}", text, flags=re.DOTALL)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, nargs="?", help="Markdown file with the markers; without it, print")
    parser.add_argument("--check", action="store_true", help="write nothing, and fail where the file differs")
    arguments = parser.parse_args()
    matrix = markdown(cells_of(collect()))
    if arguments.file is None:
        print(matrix)
        return 0
    text = arguments.file.read_text()
    if arguments.check:
        return int(with_matrix(text, matrix) != text)
    arguments.file.write_text(with_matrix(text, matrix))
    return 0


if __name__ == "__main__":
    sys.exit(main())
