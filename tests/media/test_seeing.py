"""What one query sees, drawn over a picture."""

import numpy as np
import pytest
from PIL import Image

from diffattn import TokenGrid
from diffattn.media.seeing import Mass, plot_seen, seen_pixels

GRID = TokenGrid(2, 3, before=1)


def test_cells_are_as_they_are_blocks_in_their_mean_colour_and_the_rest_blank() -> None:
    pixels = np.random.default_rng(0).random((8, 12, 3))
    keys = np.array([True, False, False, False, False, False])
    blocks = np.array([[False, True, True, False, False, False]])
    seen = seen_pixels(pixels, GRID, keys, blocks)
    np.testing.assert_array_equal(seen[:4, :4], pixels[:4, :4])
    np.testing.assert_allclose(seen[:4, 4:], np.broadcast_to(pixels[:4, 4:].mean((0, 1)), (4, 8, 3)))
    assert len(np.unique(seen[4:].reshape(-1, 3), axis=0)) == 1


def test_pixels_that_cells_do_not_divide_all_belong_to_one() -> None:
    pixels = np.ones((7, 10, 3)) * 0.25
    seen = seen_pixels(pixels, GRID, np.ones(6, dtype=bool), np.zeros((0, 6), dtype=bool))
    np.testing.assert_array_equal(seen, pixels)


def test_the_figure_tells_the_weight_of_what_is_seen() -> None:
    pytest.importorskip("matplotlib")
    mass = np.array([0.1, 0.5, 0.1, 0.1, 0.1, 0.05, 0.05])
    keys = np.array([True, False, False, False, False, False])
    blocks = np.array([[False, True, True, False, False, False]])
    figure = plot_seen(Image.new("RGB", (12, 8)), GRID, (0, 0), keys, blocks, mass, "a title")
    said = figure.get_supxlabel()
    assert "50.0% of its weight on the outlined cells" in said and "20.0% on cells seen by their mean" in said
    assert "20.0% on cells that are not seen" in said and "10.0% on 1 other tokens" in said
    assert len(figure.axes) == 4


def test_the_mass_is_parted_by_what_a_query_sees() -> None:
    grid = TokenGrid(1, 4, before=1, after=1)
    keys, blocks = np.array([True, False, False, False]), np.array([[True, True, False, False]])
    mass = Mass.of(grid, keys, blocks, np.array([0.1, 0.2, 0.3, 0.05, 0.15, 0.2]))
    np.testing.assert_allclose([mass.keys, mass.means, mass.unseen, mass.others], [0.2, 0.3, 0.2, 0.3])
    assert Mass.of(grid, keys, blocks[:0], np.full(6, 1 / 6)).means == 0
