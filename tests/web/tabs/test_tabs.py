"""What tabs show of what they found, and what they refuse."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from diffattn import ClearAttention, RoutingAttention, TokenGrid
from diffattn.comparison import Comparison, Drawn, Row
from diffattn.measure.watching import Caught
from diffattn.mechanisms.base import Context
from diffattn.web.found import Folders, Frames, sheets
from diffattn.web.models import Seeing, pair_of
from diffattn.web.tabs import compare, distill, frontier, token, video


def drawn(level: float, frames: int = 0, seconds: float = 1.0) -> Drawn:
    shape = (frames, 6, 8, 3) if frames else (6, 8, 3)
    return Drawn(np.full(shape, level, np.float32), seconds, None, 0.5)


def test_a_pair_shows_its_figures() -> None:
    text = compare.show(pair_of(("full", "clear radius=1"), (drawn(0.5), drawn(0.6, seconds=2.5))))
    assert "B: clear radius=1</th><td>2.50</td><td>50.0%</td><td>20.0 dB" in text
    assert "flicker" not in text
    assert "identical" in compare.show(pair_of(("full", "softmax"), (drawn(0.5), drawn(0.5))))


def test_a_pair_of_videos_shows_its_worst_frame_and_flicker() -> None:
    first, second = drawn(0.5, frames=3), drawn(0.6, frames=3)
    second.pixels[2] = 1.0
    text = video.show(pair_of(("full", "clear"), (first, second)))
    assert "<td>6.0 dB</td>" in text and text.count("<img") == 6


def seeing() -> Seeing:
    grid = TokenGrid(4, 4, before=2)
    q, k, v = (torch.randn(1, 3, grid.tokens, 8) for _ in range(3))
    caught = Caught(RoutingAttention(share=0.9, tile=2, pool=2), grid, q, k, v, 0.3, Context(), "layer.0", 1)
    return Seeing(Image.new("RGB", (32, 32)), caught, caught.seen())


def test_the_middle_token_is_seen_first() -> None:
    text = token.show(seeing(), None, None, None)
    assert 'data-row="2" data-column="2"' in text and "layer.0, step 1, head 0" in text


@pytest.mark.parametrize(
    ("place", "words"),
    [
        ((3, 0, 0), "a head from 0 to 2, got 3"),
        ((0, 4, 0), "a row from 0 to 3, got 4"),
        ((0, 0, -1), "a column from 0 to 3, got -1"),
        ((0, 0, 1.5), "a column from 0 to 3, got 1.5"),
        ((0, "1", 0), "a row from 0 to 3, got 1"),
    ],
)
def test_a_token_that_is_not_there_is_refused(place: tuple[Any, ...], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        token.show(seeing(), *place)


def test_options_of_a_swap_are_refused_where_a_mechanism_is_looked_at() -> None:
    assert token.mechanism_of("clear", "radius=2").type == "clear"
    for options in ("quality=fast", "share=0.3 start=0.2"):
        with pytest.raises(ValueError, match=f"leave {options.split()[-1].partition('=')[0]} out"):
            token.mechanism_of("routing", options)


def test_a_comparison_shows_an_image_beside_full_attentions() -> None:
    rows = (
        Row("full", 0, 4.0, None, 1.0, 120.0, 120.0, None, None, None),
        Row("clear radius=1", 0, 2.0, None, 0.5, 20.0, 20.0, None, None, None),
    )
    pixels = {"full": drawn(0.5).pixels, "clear radius=1": drawn(0.6).pixels}
    found = Comparison(
        ("full", "clear radius=1"), rows, {"prompts": [{"prompt": "a <b>"}]}, MACHINE, lambda _, name: pixels[name]
    )
    assert "2.00 s, 50.0% of the attention computed, 20.0 dB" in frontier.show(found, "clear radius=1", 0)
    assert frontier.words(found, 0) == "0: a <b>"
    assert "2.00x" in frontier.figures(found)
    for setting, prompt in (("clear radius=1", 1), ("clear radius=2", 0)):
        with pytest.raises(ValueError, match="has no prompt"):
            frontier.show(found, setting, prompt)


MACHINE = {"device": "a processor", "cores": 2, "threads": 1, "torch": "2.13", "load_average": None}


def test_what_is_gone_is_told(tmp_path: Path) -> None:
    folders = Folders([tmp_path])
    with pytest.raises(ValueError, match="no comparison x lies in the folders any more"):
        frontier.opened(folders, "x")
    with pytest.raises(ValueError, match="no run x lies"):
        distill.folder_of(folders, "x")
    with pytest.raises(ValueError, match="choose clip B"):
        (tmp_path / "a.mp4").touch()
        video.show_clips(folders, f"{tmp_path.name}/a.mp4", None)
    with pytest.raises(ValueError, match="no clip ../x lies"):
        video.show_clips(folders, "../x", "../x")


def test_clips_of_other_sizes_have_no_psnr() -> None:
    small, large = (Frames([Image.new("RGB", (side, 4))] * 2, 8.0, "") for side in (4, 8))
    assert video.distance(small, small) == "PSNR of B to A: identical in the mean, identical at worst"
    assert "no PSNR" in video.distance(small, large)


def test_a_run_without_steps_sheets_or_a_whole_config(tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text("step,total\n")
    assert "no step yet" in distill.show(tmp_path)
    assert "no sheets" in distill.show_sheet(sheets(tmp_path), distill.LATEST)
    (tmp_path / "log.csv").write_text("step,total,rate\n1,0.5,0.001\n")
    assert distill.progress(tmp_path, [{"step": 1, "rate": 0.001}]) == "step 1; learning rate 0.001"
    before = distill.stamps(tmp_path)
    (tmp_path / "log.csv").write_text("step,total,rate\n1,0.5,0.001\n2,0.4,0.001\n")
    assert distill.stamps(tmp_path) != before
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"expected the config of a run in .*config\.json"):
        distill.show(tmp_path)


def test_a_run_names_its_mechanism_as_a_line_does(tmp_path: Path) -> None:
    rows = [{"step": 2, "seconds": 0.5}]
    for values, shown in (
        (ClearAttention(radius=3, pool=2).to_dict(), "clear(pool=2, radius=3)"),
        ({"type": "of-later", "girth": 1}, "{'type': 'of-later', 'girth': 1}"),
    ):
        (tmp_path / "config.json").write_text(json.dumps({"steps": 9, "mechanism": values}))
        assert distill.progress(tmp_path, rows) == f"step 2 of 9; 0.50 s a step; {shown}"
