"""Images have the size, the places and the colours that they should."""

import numpy as np
import pytest
from PIL import Image

from diffattn import ClearAttention, TokenGrid
from diffattn.files.writing import write_json, written
from diffattn.media.drawing import PAPER, Entry, error_map, heat_map, masks, plot_mask, sheet


def _plain(colour: str) -> Image.Image:
    return Image.new("RGB", (32, 16), colour)


def test_a_sheet_has_every_picture_in_its_place() -> None:
    colours = [["red", "lime"], ["blue", "yellow"], ["cyan", "magenta"]]
    rows = [[Entry(_plain(colour), ("a line",)) for colour in row] for row in colours]
    picture = sheet(rows, ["one", "two", "three"], ["left", "right"], title="title", note="note", side=64)
    pixels = np.asarray(picture).astype(int)
    centres = {}
    for row in colours:
        for colour in row:
            ys, xs = np.nonzero((pixels == np.array(Image.new("RGB", (1, 1), colour).getpixel((0, 0)))).all(axis=-1))
            assert len(ys) == 64 * 32, colour
            centres[colour] = ys.mean(), xs.mean()
    assert centres["red"][0] == centres["lime"][0] < centres["blue"][0] < centres["cyan"][0]
    assert centres["red"][1] == centres["blue"][1] < centres["lime"][1]


def test_texts_of_a_sheet_stay_inside_it() -> None:
    rows = [[Entry(_plain("red"), ("PSNR 12.3 dB", "SSIM 0.987"), np.ones((16, 32)))]]
    long = "a prompt of so many words that it is broken into several lines beside its image"
    pixels = np.asarray(sheet(rows, [long], ["head\nsecond line"], title="title", note="note"))
    edges = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    assert (edges == PAPER).all()


def test_an_error_map_is_the_largest_difference_of_a_channel() -> None:
    first, second = np.zeros((4, 5, 3), np.uint8), np.zeros((4, 5, 3), np.uint8)
    second[1, 2] = (51, 0, 102)
    found = error_map(first, second)
    assert found.shape == (4, 5) and found[1, 2] == pytest.approx(0.4) and found.sum() == found[1, 2]


def test_a_heat_map_darkens_with_the_value() -> None:
    pixels = np.asarray(heat_map(np.linspace(0, 1.5, 16)[None])).astype(int).sum(axis=-1)[0]
    assert pixels[0] == 3 * 255
    assert (np.diff(pixels) <= 0).all() and pixels[-1] < 100


def test_only_masks_can_be_drawn_as_masks() -> None:
    assert "clear" in masks() and "agent" not in masks()


@pytest.mark.parametrize("grid", [TokenGrid(6, 9, before=2, after=1), TokenGrid(5, 4, frames=3)], ids=str)
def test_a_mask_has_a_panel_for_the_matrix_and_one_per_frame(grid: TokenGrid) -> None:
    pytest.importorskip("matplotlib")
    mechanism = ClearAttention(radius=2)
    figure = plot_mask(mechanism, grid, (grid.frames - 1, 0, 1))
    matrix, *panels = [axes for axes in figure.axes if axes.axison]
    assert (np.asarray(matrix.images[0].get_array()) == mechanism.mask(grid).numpy()).all()
    assert len(panels) == grid.frames
    row = mechanism.mask(grid)[grid.before + (grid.frames - 1) * grid.height * grid.width + 1, grid.cell_slice]
    shown = np.stack([np.asarray(panel.images[0].get_array()) for panel in panels])
    assert (shown.reshape(-1) == row.numpy()).all()


def test_a_mask_too_fine_to_see_is_refused() -> None:
    with pytest.raises(ValueError, match="too fine to draw"):
        plot_mask(ClearAttention(radius=2), TokenGrid(128, 128), (0, 0, 0))


def test_a_file_appears_whole_or_not_at_all(tmp_path) -> None:
    target = tmp_path / "new" / "file.json"
    with pytest.raises(RuntimeError), written(target) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert list(target.parent.iterdir()) == []
    write_json(target, {"a": 1})
    with pytest.raises(ValueError):
        write_json(target, {"a": float("nan")})
    assert target.read_text() == '{\n  "a": 1\n}\n'
    assert [file.name for file in target.parent.iterdir()] == ["file.json"]
