"""A comparison that was written down, opened again."""

import json
from pathlib import Path

import numpy as np
import pytest

from diffattn.comparison import Comparison, Row, open_comparison
from diffattn.comparison.opening import RESULT, RUNS, file_of, read_image
from diffattn.files.writing import write_json


def saved(folder: Path) -> Comparison:
    """Two settings on one prompt, without the plots of `report.save`."""
    rows = tuple(
        Row(name, 0, seconds, None, 1.0, psnr, psnr, None, None, None)
        for name, seconds, psnr in (("full", 2.0, 120.0), ("clear radius=1", 1.0, 20.0))
    )
    setup = {"settings": ["full", "clear radius=1"], "prompts": [{"prompt": "a ring"}]}
    found = Comparison(("full", "clear radius=1"), rows, setup, {"cpu": "a processor"}, lambda *_: np.zeros(3))
    write_json(folder / RESULT, found.to_dict())
    (folder / RUNS).mkdir()
    for number in range(2):
        np.save(file_of(folder / RUNS, 0, number, "npy"), np.full((4, 4, 3), number, np.float32))
    return found


def test_it_is_as_it_was_and_images_are_found_by_setting(tmp_path: Path) -> None:
    want, found = saved(tmp_path), open_comparison(tmp_path)
    assert (found, found.lines) == (want, want.lines)
    assert (found.pixels(0, "clear radius=1") == 1).all() and (found.pixels(0, "full") == 0).all()


@pytest.mark.parametrize("broken", ["", "{", "[]", '{"setup": {}}', "null"])
def test_what_is_no_comparison_is_refused(broken: str, tmp_path: Path) -> None:
    (tmp_path / RESULT).write_text(broken)
    with pytest.raises(ValueError, match=r"expected a comparison in .*compare\.json"):
        open_comparison(tmp_path)
    with pytest.raises(ValueError, match="expected a comparison"):
        open_comparison(tmp_path / "nowhere")


def test_a_setting_without_rows_is_refused(tmp_path: Path) -> None:
    saved(tmp_path)
    values = json.loads((tmp_path / RESULT).read_text())
    write_json(tmp_path / RESULT, {**values, "rows": values["rows"][:1]})
    with pytest.raises(ValueError, match="expected a comparison"):
        open_comparison(tmp_path)


def test_an_image_that_is_gone_or_runs_code_is_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.array([print]), allow_pickle=True)
    for name in ("a.npy", "b.npy"):
        with pytest.raises(ValueError, match="expected an image of a comparison"):
            read_image(tmp_path / name)
