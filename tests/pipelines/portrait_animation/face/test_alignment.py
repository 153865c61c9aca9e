"""Resizing, and the map of a driving face onto the source's."""

import numpy as np
import pytest
from diffattn.pipelines.portrait_animation.face.alignment import Alignment, align_faces, best_frame, resize

SMALL = (np.indices((7, 11)).sum(0) * 37 % 251).astype(np.uint8)


def face(x: float = 60.0, y: float = 40.0, width: float = 30.0, height: float = 50.0) -> np.ndarray:
    """68 points within a box."""
    points = np.random.default_rng(7).random((68, 2))
    points = (points - points.min(0)) / np.ptp(points, axis=0)
    return points * (width, height) + (x, y)


def colour(gray: np.ndarray) -> np.ndarray:
    """Three channels that differ."""
    return np.stack([gray, gray[::-1], gray[:, ::-1]], -1)


def test_shrinking_smooths_as_recorded() -> None:
    """The numbers of scikit-image 0.26: resize(SMALL, (3, 4)), anti-aliased."""
    want = [
        [0.265389, 0.605604, 0.33802, 0.437853],
        [0.5744, 0.424164, 0.381726, 0.699141],
        [0.52769, 0.319821, 0.645799, 0.328789],
    ]
    got = resize(colour(SMALL), 3, 4)
    assert got.dtype == np.float32 and got.flags.c_contiguous
    np.testing.assert_allclose(got, colour(np.array(want)), atol=2e-6)


def test_one_axis_may_grow_and_the_other_shrink() -> None:
    """The numbers of scikit-image 0.26: resize(SMALL, (5, 16))[:, ::3], and a row of two pixels made five."""
    want = [
        [0.051692, 0.305614, 0.604878, 0.682667, 0.219094, 0.473016],
        [0.254828, 0.50875, 0.808013, 0.122967, 0.42223, 0.676152],
        [0.457966, 0.711887, 0.057601, 0.326103, 0.625368, 0.879286],
        [0.661103, 0.55821, 0.229976, 0.52924, 0.791592, 0.190394],
        [0.741201, 0.152304, 0.433112, 0.732377, 0.225739, 0.301249],
    ]
    np.testing.assert_allclose(resize(colour(SMALL), 5, 16)[:, ::3, 0], want, atol=2e-6)
    row = resize(np.repeat(np.array([[7, 90]], np.uint8)[..., None], 3, -1), 1, 5)
    np.testing.assert_allclose(row[0, :, 1], [0.125098, 0.06, 0.190196, 0.320392, 0.255294], atol=2e-6)


def test_the_same_size_keeps_and_one_pixel_fills() -> None:
    frame = colour(SMALL)
    np.testing.assert_allclose(resize(frame, 7, 11) * 255, frame, atol=1e-4)
    picture = (frame / 255).astype(np.float32)
    np.testing.assert_allclose(resize(picture, 4, 5), resize(frame, 4, 5), atol=1e-6)
    np.testing.assert_allclose(resize(frame[:1, :1], 3, 2), np.broadcast_to(frame[0, 0] / 255, (3, 2, 3)), atol=1e-6)
    np.testing.assert_allclose(resize(frame, 1, 1)[0, 0], picture.mean((0, 1)), atol=0.05)


@pytest.mark.parametrize(
    ("frame", "size", "message"),
    [
        (SMALL, (3, 3), "expected a frame"),
        (colour(SMALL)[:0], (3, 3), "expected a frame"),
        (colour(SMALL), (0, 3), "expected a size"),
    ],
)
def test_what_cannot_be_resized_is_refused(frame: np.ndarray, size: tuple[int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        resize(frame, *size)


def test_a_face_moves_onto_the_other() -> None:
    """Mean on mean and extent on extent; each axis has a scale of its own."""
    driving, source = face(), face(10.0, 90.0, 90.0, 25.0)[::-1]
    moved = align_faces(source, driving).move(driving)
    np.testing.assert_allclose(moved.mean(0), source.mean(0))
    np.testing.assert_allclose(np.ptp(moved, axis=0), np.ptp(source, axis=0))
    found = align_faces(source, driving)
    np.testing.assert_allclose(found.scale, (3.0, 0.5))
    same = align_faces(driving, driving)
    np.testing.assert_allclose([*same.scale, *same.shift], [1, 1, 0, 0], atol=1e-12)


def test_pixels_move_as_points_do() -> None:
    picture = np.zeros((40, 60, 3), dtype=np.float32)
    picture[12, 20] = (1.0, 0.5, 0.25)
    moved = Alignment((1.0, 1.0), (7.0, -5.0)).warp(picture)
    assert moved.shape == picture.shape and moved.dtype == np.float32
    np.testing.assert_array_equal(moved[7, 27], (1.0, 0.5, 0.25))
    assert moved.sum() == 1.75
    half = Alignment((1.0, 1.0), (0.25, 0.0)).warp(picture)
    np.testing.assert_allclose(half[12, 20:22, 0], (0.75, 0.25))
    wide = Alignment((3.0, 2.0), (-20.0, 1.0))
    (x, y) = wide.move(np.array([[20.0, 12.0]]))[0]
    assert wide.warp(picture)[int(y), int(x), 0] == 1.0


def test_what_comes_from_outside_is_black() -> None:
    picture = np.ones((6, 5, 3), dtype=np.float32)
    moved = Alignment((0.5, 1.0), (1.0, 2.0)).warp(picture)
    assert not moved[:2].any() and not moved[:, 0].any() and not moved[:, 4:].any()
    assert (moved[2:, 1:4] == 1).all()
    assert not Alignment((1.0, 1.0), (99.0, 0.0)).warp(picture).any()
    blended = Alignment((1.0, 1.0), (-0.5, 0.0)).warp(picture)
    np.testing.assert_allclose(blended[:, 4], 0.5)


def test_the_best_frame_is_the_nearest() -> None:
    source = face()
    driving = [None, source + 9, source - 2, source + 2.5, None]
    assert best_frame(source, driving) == 2
    assert best_frame(source, [source - 1, source + 1]) == 0
    with pytest.raises(ValueError, match="expected a face in at least one of 2 driving frames"):
        best_frame(source, [None, None])


@pytest.mark.parametrize("wrong", [face()[:67], face() * np.nan, face()[None]])
def test_wrong_points_are_refused(wrong: np.ndarray) -> None:
    for source, driving in ((wrong, face()), (face(), wrong)):
        with pytest.raises(ValueError, match="expected finite points of one face"):
            align_faces(source, driving)
    with pytest.raises(ValueError, match="expected finite points of one face"):
        best_frame(wrong, [face()])


@pytest.mark.parametrize("flat", [(0.0, 50.0), (30.0, 0.0)])
def test_a_face_without_an_extent_is_refused(flat: tuple[float, float]) -> None:
    points = face() * 0 + (5.0, 5.0) + np.linspace(0, 1, 68)[:, None] * flat
    for source, driving in ((points, face()), (face(), points)):
        with pytest.raises(ValueError, match="expected faces with an extent"):
            align_faces(source, driving)
