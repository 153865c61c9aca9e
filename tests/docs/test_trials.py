"""The trials of distillation: their tables are what docs/distillation.json holds, which keeps what a folder lacks."""

import json
from pathlib import Path

import pytest

from scripts.numbers import distillation_trials as trials

ROOT = Path(__file__).resolve().parents[2]


def test_the_tables_are_what_was_measured() -> None:
    known = json.loads((ROOT / "docs" / "distillation.json").read_text())
    text = (ROOT / "docs" / "distillation.md").read_text()
    shown = 0
    for group in trials.GROUPS:
        _, found, rest = text.partition(f"<!-- trials {group} -->\n")
        if found:
            shown += 1
            assert rest.partition("\n<!-- /trials")[0] == trials.table(group, known), "distillation_trials.py page"
    assert shown


def record(options: tuple[str, ...], error: float) -> dict[str, object]:
    judged = {"clear(radius=3)": {"student": error, "swap_alone": 0.3}}
    own = {"judged": judged, "psnr": {"student": 27.4}, "cpu_seconds": 90.0, "vectors": "AVX2"}
    return own | {"options": list(options), "machine": {"cpu": "some"}}


def test_what_the_folder_lacks_is_kept(tmp_path: Path) -> None:
    first, second, third = trials.TRIALS[:3]
    (tmp_path / "runs" / first.folder).mkdir(parents=True)
    (tmp_path / "runs" / first.folder / "trial.json").write_text(json.dumps(record(first.options, 0.02)))
    file = tmp_path / "known.json"
    changed = record(("mechanism.radius=9",), 0.5)
    file.write_text(json.dumps({second.folder: record(second.options, 0.1), third.folder: changed}))
    found = trials.collect(tmp_path / "runs", file)
    assert json.loads(file.read_text()) == found
    assert list(found) == [first.folder, second.folder], "a trial whose options are others now is left out"
    lines = trials.table("radii", found).splitlines()
    assert lines[2:] == [
        "| radius 3 | `the preset` | 1.5 (AVX2) | `clear(radius=3)` | 0.0200 | 0.3000 | 15.0 | 27.4 dB |",
        "| radius 4 | `the preset` | 1.5 (AVX2) | `clear(radius=3)` | 0.1000 | 0.3000 | 3.0 | 27.4 dB |",
    ]
    assert trials.table("agent", found) == "*Not measured yet.*"


def test_every_trial_has_a_config_and_a_folder_of_its_own() -> None:
    assert len({trial.folder for trial in trials.TRIALS}) == len(trials.TRIALS)
    for trial in trials.TRIALS:
        assert trial.config.steps > 0, trial.name
    with pytest.raises(Exception, match="expected a group of radii"):
        list(trials.chosen("radius", None, "1/1"))
