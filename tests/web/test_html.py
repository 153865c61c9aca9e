"""Pieces of the page: escaped, with their texts, and right in what they show."""

import base64
import io
import re

import numpy as np
import pytest
from PIL import Image

from diffattn import TokenGrid
from diffattn.measure.watching import Look
from diffattn.web import html

WORDS = "<script>alert(1)</script> & \"both\" 'kinds'"
RED, BLUE = (Image.new("RGB", (6, 4), colour) for colour in ("red", "blue"))


def images(text: str) -> list[np.ndarray]:
    found = re.findall(r'src="data:image/png;base64,([^"]+)"', text)
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(one)))) for one in found]


@pytest.mark.parametrize(
    "text",
    [
        html.alert(WORDS),
        html.status(WORDS, 1, 2),
        html.notes([WORDS]),
        html.table([WORDS], [[WORDS, WORDS]], WORDS),
        html.wipe(RED, BLUE, (WORDS, WORDS)),
        html.player([RED], [BLUE], (WORDS, WORDS), 8),
        html.figure("", WORDS),
    ],
    ids=["alert", "status", "notes", "table", "wipe", "player", "figure"],
)
def test_no_text_becomes_code(text: str) -> None:
    assert "<script" not in text and "&lt;script&gt;" in text
    assert '"both"' not in text


def test_nothing_is_said_where_there_is_nothing() -> None:
    assert html.alert("") == html.status() == html.notes([]) == ""


def test_images_come_whole_with_a_text_and_a_difference() -> None:
    text = html.wipe(RED, BLUE, ("full", "clear"))
    first, second, difference = images(text)
    assert (first == RED).all() and (second == BLUE).all()
    assert difference.max() < 60  # black: as far apart as can be
    assert text.count("<img") == text.count(" alt=") == 3 and 'alt=""' not in text
    assert (images(html.wipe(RED, RED, ("a", "b")))[2] == 255).all()


def test_a_player_shows_the_first_frame_and_hides_the_others() -> None:
    text = html.player([RED, BLUE, RED], [BLUE, RED], ("full", "clear"), 12.5)
    assert text.count("<img") == 5 and text.count(" hidden>") == 3
    assert 'max="2"' in text and 'data-rate="12.5"' in text
    assert 'alt="A, frame 3 of 3: full"' in text and 'alt="B, frame 2 of 2: clear"' in text


def looked() -> tuple[TokenGrid, Look]:
    """2 x 4 cells after 3 others: two exact, a block of two and one with an exact cell, four unseen."""
    keys = np.zeros(8, bool)
    keys[[0, 1]] = True
    blocks = np.zeros((2, 8), bool)
    blocks[0, [2, 3]] = True
    blocks[1, [1]] = True
    return TokenGrid(2, 4, before=3), Look(keys, blocks, np.arange(11) / 55)


def test_the_map_marks_what_the_query_sees() -> None:
    text = html.token_map(RED, looked()[0], (1, 2), looked()[1])
    paths = dict(re.findall(r'<path class="da-(\w+)" d="([^"]+)"', text))
    assert paths == {"unseen": "M0 1h4v1h-4z", "mean": "M2 0h2v1h-2z", "key": "M0 0h2v1h-2z"}
    assert '<rect class="da-query" x="2" y="1"' in text
    assert 'data-row="1" data-column="2" data-rows="2" data-columns="4"' in text
    assert "row 1, column 2 sees 2 cells exactly and 2 by a mean" in text


def test_the_mass_is_that_of_full_attention_on_what_is_seen() -> None:
    text = html.mass_table(*looked())
    shares = [float(one) for one in re.findall(r"<td>([\d.]+)%</td>", text)]
    assert shares == pytest.approx([700 / 55, 1100 / 55, 3400 / 55, 300 / 55], abs=0.06)
    assert "4 cells" in text and "2 cells in 2 blocks" in text


def test_videos_are_images_no_larger_than_the_page_wants() -> None:
    assert [one.size for one in html.pixels_as_images(np.zeros((3, 600, 1200, 3)))] == [(512, 256)] * 3
    assert [one.size for one in html.pixels_as_images(np.zeros((600, 1200, 3)))] == [(1200, 600)]
