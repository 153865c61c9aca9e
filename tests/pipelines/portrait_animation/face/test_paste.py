"""Cutting a face out and putting it back."""

import numpy as np
import pytest
from diffattn.pipelines.portrait_animation.face.paste import Box, crop, face_box, paste

FRAME = np.random.default_rng(3).integers(0, 256, (45, 71, 3), dtype=np.uint8)


def points(low: tuple[float, float], high: tuple[float, float]) -> np.ndarray:
    return np.linspace(low, high, 68)


def test_the_box_lies_around_the_face() -> None:
    assert face_box(points((40.0, 30.0), (60.0, 40.0)), 200, 300, margin=0.5) == Box(top=15, left=30, side=40)
    assert face_box(points((40.0, 30.0), (60.0, 40.0)), 200, 300, margin=0.0) == Box(top=25, left=40, side=20)
    places = np.stack([points((40.0, 30.0), (60.0, 40.0)), points((50.0, 50.0), (70.0, 60.0))])
    assert face_box(places, 200, 300, margin=0.0) == Box(top=30, left=40, side=30)


@pytest.mark.parametrize("place", [(-30.0, -30.0), (60.0, 2.0), (5.0, 44.0), (500.0, 500.0)])
@pytest.mark.parametrize("size", [0.0, 9.0, 100.0])
def test_the_box_stays_in_the_frame(place: tuple[float, float], size: float) -> None:
    box = face_box(points(place, (place[0] + size, place[1] + size)), 45, 71)
    assert 0 <= box.top <= 45 - box.side and 0 <= box.left <= 71 - box.side and box.side >= 1


def test_a_crop_is_the_square_at_another_size() -> None:
    box = Box(top=5, left=30, side=20)
    np.testing.assert_allclose(crop(FRAME, box, 20) * 255, FRAME[5:25, 30:50], atol=1e-4)
    assert crop(FRAME, box, 33).shape == (33, 33, 3)


@pytest.mark.parametrize("size", [20, 57])
def test_outside_the_box_nothing_changes(size: int) -> None:
    box, before = Box(top=5, left=30, side=20), FRAME.copy()
    out = paste(FRAME, np.zeros((size, size, 3), dtype=np.float32), box)
    inside = np.zeros(FRAME.shape[:2], dtype=bool)
    inside[box.area] = True
    assert out.dtype == np.uint8 and out.shape == FRAME.shape and np.array_equal(FRAME, before)
    assert np.array_equal(out[~inside], FRAME[~inside]) and not out[10:20, 35:45].any()


def test_what_was_cut_out_goes_back_unchanged() -> None:
    box = Box(top=5, left=30, side=20)
    assert np.array_equal(paste(FRAME, crop(FRAME, box, 20), box), FRAME)


def test_the_edge_is_blended_by_distance() -> None:
    white, black = np.full((45, 71, 3), 200, np.uint8), np.zeros((40, 40, 3), np.float32)
    out = paste(white, black, Box(top=2, left=3, side=40), feather=0.25)[..., 0]
    np.testing.assert_array_equal(out[22, 3:13], np.round(200 * (1 - (np.arange(10) + 0.5) / 10)))
    assert np.array_equal(out[2:42, 3:43], out[2:42, 3:43][::-1, ::-1]) and not out[12:32, 13:33].any()
    hard = paste(white, black, Box(top=2, left=3, side=40), feather=0)[..., 0]
    assert not hard[2:42, 3:43].any() and (hard == 200).sum() == 45 * 71 - 1600


def test_the_frames_own_border_is_no_edge() -> None:
    white, black = np.full((40, 71, 3), 200, np.uint8), np.zeros((40, 40, 3), np.float32)
    out = paste(white, black, Box(top=0, left=31, side=40), feather=0.25)[..., 0]
    assert not out[0, 41:].any() and not out[-1, 41:].any() and not out[:, -1].any()
    assert (out[:, 31] > 180).all()


def test_values_out_of_range_are_cut() -> None:
    face = np.stack([np.full((4, 4), value, np.float32) for value in (-0.5, 0.5, 1.5)], -1)
    out = paste(FRAME, face, Box(top=9, left=9, side=4), feather=0)
    assert (out[9:13, 9:13] == (0, 128, 255)).all()


def test_a_wrong_box_or_number_is_refused() -> None:
    face = np.zeros((4, 4, 3), np.float32)
    for box in (Box(0, 60, 20), Box(40, 0, 20), Box(-1, 0, 20)):
        with pytest.raises(ValueError, match="expected a uint8 frame that holds Box"):
            paste(FRAME, face, box)
    with pytest.raises(ValueError, match="expected a uint8 frame that holds Box"):
        paste(FRAME / 255, face, Box(0, 0, 20))
    for feather in (-0.1, 0.6):
        with pytest.raises(ValueError, match="expected feather from 0 to 0.5"):
            paste(FRAME, face, Box(0, 0, 20), feather)
    with pytest.raises(ValueError, match="expected finite points"):
        face_box(np.full((68, 2), np.nan), 45, 71)
    with pytest.raises(ValueError, match="expected a margin"):
        face_box(points((1.0, 1.0), (9.0, 9.0)), 45, 71, margin=-1)
