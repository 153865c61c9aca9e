"""The survey of the patterns: its budgets hold, it goes on where it was stopped, and its page is what was measured."""

import functools
import itertools
import json
from dataclasses import replace
from pathlib import Path

import patterns
import pytest
import typer
from patterns_survey import collecting, measuring, page, plots, timing, training
from patterns_survey.cells import CELLS, Cell, Stage
from patterns_survey.settings import KINDS, SETTINGS, Setting, Solved, chosen
from patterns_survey.solving import largest, pairs

from diffattn import ClearAttention, PerHeadAttention, TokenGrid, config

ROOT = Path(__file__).resolve().parents[1]
IMAGE = Cell("image", "Image", TokenGrid(8, 8, before=6), 0.5, 1, 10, 2)
VIDEO = Cell("video", "Video", TokenGrid(6, 6, frames=3), 0.5, 1, 10, (1, 3, 3))


@functools.cache
def solved(one: Setting, cell: Cell) -> Solved:
    return one.solve(cell)


def setting(name: str) -> Setting:
    return chosen([name])[0]


def test_the_page_is_what_was_measured() -> None:
    values = json.loads((ROOT / "docs" / "patterns.json").read_text())
    text = (ROOT / "docs" / "patterns.md").read_text()
    for name, table in page.tables(values).items():
        shown = text.partition(f"<!-- {name} -->")[2].partition(f"<!-- /{name} -->")[0].strip()
        assert shown == table, f"python scripts/patterns.py page writes {name} anew"


def test_every_mechanism_is_in_the_survey() -> None:
    found = {
        type(found.mechanism).type
        for cell in (IMAGE, VIDEO)
        for found in (solved(one, cell).found for one in SETTINGS)
        if found.mechanism is not None
    }
    own = {name for name, cls in config.registered().items() if cls.__module__.startswith("diffattn.")}
    assert found == own


def test_teachers_of_other_prompts_are_refused(tmp_path: Path) -> None:
    """Which prompts a cell has depends on their number, so a folder is of one number."""
    three = replace(CELLS["128"], prompts=3)
    stage = Stage(three, tmp_path)
    assert stage.painter is not None and len(stage.painter.prompts) == 3
    with pytest.raises(ValueError, match="prompts"):
        Stage(replace(three, prompts=4), tmp_path)


def test_no_more_prompts_are_measured_than_a_cell_has() -> None:
    with pytest.raises(typer.BadParameter, match="at most 12 prompts, which 512 has; got 13"):
        patterns._count(CELLS["512"], 13)
    assert (patterns._count(CELLS["512"], None), patterns._count(CELLS["video"], 2)) == (12, 2)


@pytest.mark.parametrize("cell", [IMAGE, VIDEO], ids=lambda cell: cell.name)
def test_no_share_is_above_the_budget_unless_it_says_so(cell: Cell) -> None:
    for one in SETTINGS:
        own = solved(one, cell)
        if own.found.mechanism is not None:
            assert own.share <= cell.budget or "above" in own.found.note, one.name
            assert own.share > 0 and (own.share <= 1 or "above" in own.found.note)
            assert one.kind in KINDS


def test_the_largest_option_within_the_budget_is_chosen() -> None:
    found = setting("clear").solve(IMAGE).found
    shares = {pairs(ClearAttention(radius=number / 10), IMAGE) for number in range(10, 64)}
    assert found.share == max(share for share in shares if share <= IMAGE.budget)


def test_the_least_is_given_where_all_are_above_the_budget() -> None:
    found = setting("clear, pool").solve(replace(IMAGE, budget=0.05)).found
    assert found.mechanism == ClearAttention(radius=1.0, pool=2)
    assert "above 5%" in found.note


def test_outputs_are_used_again_as_often_as_the_budget_asks() -> None:
    alone, broadcast = (setting(name).solve(IMAGE) for name in ("reuse alone", "Pyramid Attention Broadcast"))
    assert (alone.reuse, alone.share) == (3, 0.4)  # steps 0, 3, 6, 9 of ten
    assert (broadcast.reuse, broadcast.share) == (2, 0.5)
    least = setting("reuse alone").solve(replace(IMAGE, budget=0.1))
    assert least.share == 0.2
    assert "above 10%" in least.found.note


def test_reuse_leaves_more_to_a_computed_step() -> None:
    every, second = setting("routing").solve(IMAGE), setting("routing, reuse 2").solve(IMAGE)
    assert second.found.share > every.found.share
    assert second.share == pytest.approx(0.6 * second.found.share)


def test_what_is_not_registered_or_has_no_such_option_is_left_out_with_the_reason() -> None:
    assert largest("nowhere")(IMAGE, 0.5).note == "not in this version"
    found = largest("clear", ("radius", [2.0]), girth=[1])(IMAGE, 0.5)
    assert found.mechanism is None
    assert "has no option 'girth'" in found.note


def test_wrong_names_and_parts_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown setting 'clear, pol'; the settings: clear; clear, pool;"):
        chosen(["clear, pol"])
    with pytest.raises(ValueError, match="a part is I/N .* got '3/2'"):
        chosen([], "3/2")
    both = chosen([], "1/2") + chosen([], "2/2")
    assert sorted(one.name for one in both) == sorted(one.name for one in SETTINGS)


def test_a_stopped_run_goes_on_unless_options_or_machine_are_others(tmp_path: Path) -> None:
    path, facts = tmp_path / "clear.json", setting("clear").solve(IMAGE).facts
    record = measuring.opened(path, facts) | {"psnr": {"0": 30.0}}
    path.write_text(json.dumps(record))
    assert measuring.opened(path, facts) == record
    assert "psnr" not in measuring.opened(path, facts | {"mechanism": "clear(radius=1)"})
    path.write_text(json.dumps(record | {"machine": record["machine"] | {"cpu": "another"}}))
    with pytest.raises(ValueError, match="was measured with cpu another"):
        measuring.opened(path, facts)


def runs(folder: Path) -> Path:
    """Records of four settings in two cells."""
    for name, cell in CELLS.items():
        if name not in ("128", "256"):
            continue
        for number, one in enumerate(SETTINGS[:4]):
            path = measuring.file_of(folder, cell, one)
            facts = {**solved(one, IMAGE).facts, "cell": name, "machine": measuring.machine()}
            path.parent.mkdir(parents=True, exist_ok=True)
            if number == 3:
                path.write_text(json.dumps({**facts, "mechanism": None, "note": "not in this version"}))
                continue
            figures = {"psnr": {"10": 30.0 + number, "2": 20.0}, "error": {"2": [0.1, 0.2, 0.3], "10": [0.1] * 3}}
            path.write_text(json.dumps(facts | figures))
            time = facts | {"seconds": [0.002, 0.004, 0.003], "full_seconds": [0.006] * 3, "threads": 1}
            measuring.file_of(folder, cell, one, "time").write_text(json.dumps(time))
            trained = facts | {"psnr": {"2": 40.0, "10": 41.0}, "minutes": 10.0, "steps_trained": 9, "batch": 4}
            measuring.file_of(folder, cell, one, "distilled").write_text(json.dumps(trained))
    return folder


def test_tables_and_plots_come_from_the_records(tmp_path: Path) -> None:
    file = tmp_path / "docs" / "patterns.json"
    values = collecting.collect(runs(tmp_path / "runs"), file, [one.name for one in SETTINGS])
    assert json.loads(file.read_text()) == values
    text = file.read_text()
    collecting.collect(tmp_path / "runs", file, [one.name for one in SETTINGS])
    assert file.read_text() == text, "the same figures are the same lines"
    assert collecting.collect(tmp_path / "nothing", file, [one.name for one in SETTINGS]) == values
    rows = values["cells"]["256"]["settings"]
    assert [row["setting"] for row in rows] == [one.name for one in SETTINGS[:4]]
    assert rows[0]["psnr"] == [20.0, 30.0], "in the order of the prompts' numbers"
    table = page.tables(values)["cell 256"].splitlines()
    first = table[4]
    assert first.startswith("| halo |"), "the nearest first"
    assert "| 3 (2.5-3.5) | 2.00x | 26.0 | 20.0-32.0 | 0.1500 |" in first
    assert table[-1] == "Not in the table: halo, pool (not in this version)."
    assert "| 3 (2.5-3.5) | 2.00x | 9 | 26.0 | 40.5 | 40.0-41.0 | 2 of 2 | 0.1500 |" in page.tables(values)["distilled"]
    assert page.tables(values)["cell 512"] == "*Not measured yet.*"
    assert page.tables(values)["otherwise"] == "*Not measured yet.*"
    plots.draw(tmp_path / "docs", values)
    names = {path.name for path in (tmp_path / "docs").glob("*.png")}
    assert names == {"patterns.png", "patterns-128.png", "patterns-256.png", "patterns-distilled.png"}


def test_what_training_brought_and_what_had_none() -> None:
    figures = {"psnr": [30.0], "error": [[0.1]], "share": 0.2, "gflops": 1.0, "reuse": 1}
    own = {"psnr": [31.0], "minutes": 10.0, "batch": 4, "steps_trained": 9}
    rows = [
        {"setting": "clear", "mechanism": "clear()", "distilled": own, **figures},
        {"setting": "halo", "mechanism": "halo()", **figures},
        {"setting": "criss_cross", "mechanism": "criss_cross()", **figures, "error": [[0.2]]},
        {"setting": "calibrated", "mechanism": "a recipe of clear()", **figures},
        {"setting": "broadcast", "mechanism": "softmax()", **figures},
        {"setting": "twice", "mechanism": "routing()", **figures, "reuse": 2},
    ]
    table = page.distilled_table(
        {"settings": [{**rows[0], "psnr": [30.0, 31.0], "distilled": own | {"psnr": [31.0] * 2}}]}
    )
    assert "| 30.5 | 31.0 | 31.0-31.0 | 1 of 2 |" in table and "Not in the table" not in table
    last = page.distilled_table({"settings": rows}).splitlines()[-1]
    assert last == (
        "Not in the table: halo (the same pairs as clear); criss_cross (not trained yet); calibrated (a recipe, with a "
        "mechanism for each head); broadcast (outputs used again); twice (outputs used again)."
    )


def test_what_was_trained_otherwise_has_a_table_of_its_own(tmp_path: Path) -> None:
    cell, one, half = CELLS["256"], SETTINGS[0], replace(CELLS["256"], budget=0.5)
    kinds = {training.kind_of(*own) for own in ((cell, ()), (half, ()), (cell, ("rate=1",)), (cell, ("rate=2",)))}
    assert len(kinds) == 4 and "distilled" in kinds
    folder, values = runs(tmp_path / "runs"), {}
    for changes in ((), ("rate=1", "loss.target=0")):
        path = measuring.file_of(folder, cell, one, training.kind_of(half, changes))
        facts = {**solved(one, IMAGE).facts, "machine": measuring.machine(), "minutes": 5.0, "steps_trained": 9}
        path.write_text(
            json.dumps(facts | {"batch": 4, "psnr": {"2": 40.0}} | ({"changes": changes} if changes else {}))
        )
        values = collecting.collect(folder, tmp_path / "patterns.json", [own.name for own in SETTINGS])
    assert collecting.collect(tmp_path / "nothing", tmp_path / "patterns.json", ["clear"])["cells"]["256"]["otherwise"]
    table = page.tables(values)["otherwise"].splitlines()
    assert "| the preset's | 5 | 9 | 40.0 | 40.0-40.0 | - |" in table[2]
    assert "| `rate=1 loss.target=0` | 5 | 9 |" in table[3]
    assert len(values["cells"]["256"]["settings"]) == 4, "none is in the cell's table"


def test_calls_by_head_are_timed_beside_their_parts() -> None:
    mechanism = PerHeadAttention(mechanisms=(ClearAttention(radius=2), ClearAttention(radius=3)), heads=(0, 1, 1))
    found = timing._time(IMAGE, mechanism, 2)
    assert len(found["parts_seconds"]) == len(found["seconds"]) == 2 and min(found["parts_seconds"]) > 0
    row = {"setting": "two", "seconds": [3.0, 3.3, 3.0], "parts_seconds": [2.0, 3.0, 2.0], "psnr": [30.0]}
    row |= {"mechanism": "m", "reuse": 1, "share": 0.5, "gflops": 1.0, "full_seconds": [6.0]}
    table = page.cell_table({"budget": 0.5, "steps": 2, "settings": [row]})
    assert "1.50 times its parts (two)" in table
    del row["parts_seconds"]
    assert "its parts" not in page.cell_table({"budget": 0.5, "steps": 2, "settings": [row]})
    assert not timing._time(IMAGE, ClearAttention(radius=2), 2).get("parts_seconds")


def test_figures_of_two_machines_stand_together_with_marks(tmp_path: Path) -> None:
    """A folder of runs of one machine, then a time and a training alone of another."""
    file, order = tmp_path / "patterns.json", [one.name for one in SETTINGS]
    first = collecting.collect(runs(tmp_path / "runs"), file, order)
    other = measuring.machine() | {"vectors": "mmx"}
    for kind in ("time", "distilled"):
        name = measuring.file_of(Path(), CELLS["256"], SETTINGS[1], kind)
        record = json.loads((tmp_path / "runs" / name).read_text()) | {"machine": other}
        (tmp_path / "later" / "256").mkdir(parents=True, exist_ok=True)
        (tmp_path / "later" / name).write_text(json.dumps(record))
    values = collecting.collect(tmp_path / "later", file, order)
    assert values["machines"] == [*first["machines"], other]
    marked = values["cells"]["256"]["settings"][1]
    assert (marked["time_machine"], marked["distilled"]["machine"], "machine" in marked) == (2, 2, False)
    former = first["cells"]["256"]["settings"]
    assert [row for row in values["cells"]["256"]["settings"] if row is not marked] == [former[0], *former[2:]]
    tables = page.tables(values)
    assert f"[2] {other['cpu']} with mmx" in tables["machine"]
    assert "| 3 (2.5-3.5)[2] | 2.00x |" in tables["cell 256"] and "| 3 (2.5-3.5) | 2.00x |" in tables["cell 256"]
    assert "| 9[2] |" in tables["distilled"] and "| 9 |" in tables["distilled"]
    assert collecting.collect(tmp_path / "runs", file, order)["cells"] == first["cells"]


def test_figures_of_other_versions_are_refused(tmp_path: Path) -> None:
    folder, order = runs(tmp_path), [one.name for one in SETTINGS]
    path = measuring.file_of(folder, CELLS["256"], SETTINGS[1])
    record = json.loads(path.read_text())
    path.write_text(json.dumps(record | {"machine": record["machine"] | {"torch": "0.1"}}))
    with pytest.raises(ValueError, match="has torch 0.1, and the others have"):
        collecting.collect(folder, tmp_path / "patterns.json", order)


def test_names_beside_a_plot_stand_apart() -> None:
    places = plots._apart([50.0, 49.9, 49.8, 10.0, 9.9], 0.0, 60.0, 5)
    step = 60.0 / 34
    assert all(above - below >= step - 1e-9 for above, below in itertools.pairwise(places))
    assert places[0] == 50.0
