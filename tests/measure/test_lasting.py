"""Figures of one video alone: what flashes, what drifts, what comes again."""

import numpy as np
import pytest

from diffattn.measure.lasting import drift, loop, own_flicker


def fading(frames: int) -> np.ndarray:
    """Every pixel gets brighter evenly."""
    return np.broadcast_to(np.linspace(0, 1, frames)[:, None, None, None], (frames, 4, 5, 3)).copy()


def test_flicker_is_what_changes_unevenly() -> None:
    assert own_flicker(fading(9)) < 1e-9
    flashing = np.zeros((8, 4, 4, 3))
    flashing[::2] = 1
    assert own_flicker(flashing) == pytest.approx(1.0)
    assert np.isnan(own_flicker(flashing[:2]))


def test_drift_is_between_the_ends() -> None:
    assert drift(fading(41), span=1) == pytest.approx(1.0)
    assert drift(fading(41), span=20) == pytest.approx(21 / 40)
    assert drift(np.concatenate([fading(9), fading(9)]), span=9) == pytest.approx(0.0)
    assert np.isnan(drift(fading(9), span=5))


def test_loop_is_what_comes_again() -> None:
    rng = np.random.default_rng(0)
    once = rng.random((8, 3, 3, 3))
    assert loop(np.concatenate([once, once]), span=8) == pytest.approx(1.0)
    assert loop(np.zeros((20, 2, 2, 3)), span=4) == 1.0
    assert loop(rng.random((40, 8, 8, 3)), span=8) < 0.3
    assert np.isnan(loop(once, span=8))


def test_a_video_has_four_axes() -> None:
    with pytest.raises(ValueError, match="expected a video"):
        drift(np.zeros((4, 4, 3)))
