"""MediaPipe's landmarks: with a stand-in for the package, and, where it is installed, the real one."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from diffattn.pipelines.portrait_animation.face.detection import choose_face
from diffattn.pipelines.portrait_animation.face.with_mediapipe import MESH, MediapipeLandmarks

from diffattn.media.pictures import read_picture


class Landmarker:
    """Sees as many faces as the first pixel says, on a mesh whose points lie on a line."""

    @staticmethod
    def create_from_options(options: Any) -> "Landmarker":
        assert options.base_options.model_asset_path.endswith("face.task")
        found = Landmarker()
        found.most = options.num_faces
        return found

    def detect(self, image: Any) -> Any:
        mesh = [SimpleNamespace(x=number / 478, y=1 - number / 478) for number in range(478)]
        return SimpleNamespace(face_landmarks=[mesh] * min(self.most, int(image.data[0, 0, 0])))


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    vision = SimpleNamespace(FaceLandmarkerOptions=SimpleNamespace, FaceLandmarker=Landmarker)
    package = SimpleNamespace(
        tasks=SimpleNamespace(vision=vision, BaseOptions=SimpleNamespace),
        Image=SimpleNamespace,
        ImageFormat=SimpleNamespace(SRGB=1),
    )
    monkeypatch.setitem(sys.modules, "mediapipe", package)


def frame(faces: int) -> np.ndarray:
    return np.full((48, 956, 3), faces, dtype=np.uint8)


@pytest.mark.usefixtures("stand_in")
def test_points_are_those_of_the_mesh_in_pixels(tmp_path: Path) -> None:
    (tmp_path / "face.task").touch()
    one, none, two = MediapipeLandmarks(tmp_path / "face.task", faces=2).landmarks([frame(1), frame(0), frame(3)])
    assert none is None and one is not None and one.shape == (1, 68, 2) and two.shape == (2, 68, 2)
    np.testing.assert_allclose(one[0, :, 0], 2.0 * np.array(MESH))
    np.testing.assert_allclose(one[0, :, 1], 48 - 48 / 478 * np.array(MESH))


def test_every_point_of_the_mesh_is_named_once() -> None:
    assert len(MESH) == len(set(MESH)) == 68 and max(MESH) < 478


def test_a_missing_model_or_package_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError, match="expected MediaPipe's face landmarker"):
        MediapipeLandmarks(tmp_path / "face.task")
    (tmp_path / "face.task").touch()
    monkeypatch.setitem(sys.modules, "mediapipe", None)
    with pytest.raises(ImportError, match=r"pip install 'mediapipe>=1.2'"):
        MediapipeLandmarks(tmp_path / "face.task")


def test_the_real_one_finds_the_face() -> None:
    """With `face_landmarker.task` in tests/data, where somebody has put it."""
    pytest.importorskip("mediapipe", reason="needs MediaPipe, which is no dependency")
    data = Path(__file__).parents[3] / "data"
    if not (data / "face_landmarker.task").is_file():
        pytest.skip("needs tests/data/face_landmarker.task, which is not part of the repository")
    picture = read_picture(data / "astronaut.jpg").pixels
    (points,) = choose_face(MediapipeLandmarks(data / "face_landmarker.task").landmarks([picture]))
    assert points is not None and np.abs(points[48:60].mean(0) - (227, 144)).max() < 8
