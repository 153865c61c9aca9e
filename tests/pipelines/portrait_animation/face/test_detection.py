"""Which face counts, frames without one, points from files, and the preview."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from diffattn.pipelines.portrait_animation.face.detection import (
    LandmarkFile,
    choose_face,
    draw_landmarks,
    fill_missing,
    scale_points,
)

FRAMES = [np.zeros((9, 8, 3), dtype=np.uint8)] * 3


def face(x: float = 0.0, size: float = 10.0) -> np.ndarray:
    return np.random.default_rng(1).random((68, 2)) * size + (x, 5.0)


def test_the_largest_face_or_one_by_its_number_from_the_left() -> None:
    found = [np.stack([face(50.0), face(20.0, 30.0), face(0.0, 5.0)]), None, face(7.0)[None]]
    largest = choose_face(found)
    assert np.array_equal(largest[0], found[0][1]) and largest[1] is None and np.array_equal(largest[2], found[2][0])
    for number, place in ((0, 2), (1, 1), (2, 0)):
        assert np.array_equal(choose_face(found, number)[0], found[0][place])
    assert choose_face(found, 1)[1:] == [None, None]


@pytest.mark.parametrize("number", [-1, "first", True, 1.0])
def test_a_wrong_number_is_refused(number: Any) -> None:
    with pytest.raises(ValueError, match="expected 'largest' or the number of a face"):
        choose_face([None], number)


def test_a_frame_without_a_face_holds_or_stays_blank() -> None:
    a, b = face(1.0), face(2.0)
    held = fill_missing([None, a, None, None, b, None])
    assert [point is a for point in held] == [True, True, True, True, False, False] and held[4] is held[5] is b
    blank = fill_missing([None, a], "blank")
    assert blank[0] is None and blank[1] is a
    assert fill_missing([None], "blank") == [None]


def test_nothing_to_hold_is_refused() -> None:
    with pytest.raises(ValueError, match="expected a face in at least one of 2 frames"):
        fill_missing([None, None])
    with pytest.raises(ValueError, match="expected missing 'hold' or 'blank'"):
        fill_missing([face()], "drop")  # type: ignore[arg-type]


@pytest.mark.parametrize("faces", [1, 2])
def test_points_from_an_array(tmp_path: Path, faces: int) -> None:
    points = np.stack([np.stack([face(float(x)), face(50.0 + x)]) for x in range(3)])
    points[1, 0, 4, 1] = np.nan
    points[1, 1] = np.nan
    np.save(tmp_path / "a.npy", points[:, 0] if faces == 1 else points)
    found = LandmarkFile(tmp_path / "a.npy").landmarks(FRAMES)
    assert found[1] is None
    for number in (0, 2):
        assert found[number] is not None and np.array_equal(found[number], points[number, :faces])


def test_points_from_json(tmp_path: Path) -> None:
    one, two = face(1.0), face(9.0)
    entries = [None, one.tolist(), [one.tolist(), two.tolist()], []]
    (tmp_path / "a.JSON").write_text(json.dumps(entries))
    found = LandmarkFile(tmp_path / "a.JSON").landmarks(iter([*FRAMES, FRAMES[0]]))
    assert found[0] is None and found[3] is None
    assert np.array_equal(found[1], one[None]) and np.array_equal(found[2], np.stack([one, two]))


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.json", b"[[[1, 2], [3, 4]]]"),
        ("b.json", b"[1, 2]"),
        ("c.json", b"not JSON"),
        ("d.json", b"7"),
        ("e.npy", b"no array"),
        ("f.npy", b""),
    ],
)
def test_a_file_of_something_else_is_refused(tmp_path: Path, name: str, data: bytes) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match="expected 68 pairs of x and y, or none, for each frame in .*" + name):
        LandmarkFile(tmp_path / name)


def test_a_pickle_is_not_opened(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="expected 68 pairs"):
        LandmarkFile(tmp_path / "a.npy")


def test_a_wrong_number_of_frames_or_name_is_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.stack([face()] * 2))
    with pytest.raises(ValueError, match="expected points for 3 frames in .*; got 2"):
        LandmarkFile(tmp_path / "a.npy").landmarks(FRAMES)
    with pytest.raises(ValueError, match="in a .npy or .json file"):
        LandmarkFile(tmp_path / "a.txt")
    with pytest.raises(FileNotFoundError):
        LandmarkFile(tmp_path / "b.npy")


def test_points_scale_with_their_frame() -> None:
    scaled = scale_points(np.array([[8.0, 3.0]]), (6, 16), (12, 8))
    assert scaled.tolist() == [[4.0, 6.0]]


@pytest.mark.parametrize(("height", "width"), [(60, 91), (512, 300), (1, 1)])
def test_the_preview_marks_points_on_a_copy(height: int, width: int) -> None:
    frame = np.full((height, width, 3), 90, dtype=np.uint8)
    points = np.random.default_rng(0).random((68, 2)) * (width - 1, height - 1)
    drawn = draw_landmarks(frame, points)
    assert drawn.shape == frame.shape and drawn.dtype == np.uint8 and (frame == 90).all()
    for x, y in np.round(points).astype(int):
        assert drawn[y, x].tolist() == [255, 0, 0]


def test_the_preview_closes_eyes_and_lips_but_not_the_jaw() -> None:
    points = np.tile((5.0, 95.0), (68, 1))
    points[36:42] = [(40, 40), (50, 30), (60, 30), (70, 40), (60, 50), (50, 50)]
    points[:17] = np.linspace((20.0, 10.0), (20.0, 90.0), 17)
    points[16] = (80.0, 10.0)
    drawn = draw_landmarks(np.zeros((100, 100, 3), dtype=np.uint8), points)
    assert drawn[45, 45].tolist() == [255, 255, 0]
    assert not drawn[10, 30:70].any()


def test_the_preview_of_several_faces_is_refused() -> None:
    with pytest.raises(ValueError, match="expected finite points of one face"):
        draw_landmarks(FRAMES[0], face()[None])
