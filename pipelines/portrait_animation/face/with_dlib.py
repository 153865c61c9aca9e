"""Landmarks by dlib, the extra `face`: a detector of frontal faces and regression trees, on the CPU.

The trees' 68-point model comes with the package `face-recognition-models`. It was trained on iBUG 300-W, whose licence
excludes commercial use; the data's authors ask to be contacted before it. dlib itself is under the Boost licence.
Source: Kazemi and Sullivan, One Millisecond Face Alignment with an Ensemble of Regression Trees, 2014.
"""

import importlib.util
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from diffattn.pipelines.portrait_animation.face.detection import POINTS, Pixels, Points

MODEL = "models/shape_predictor_68_face_landmarks.dat"
"""Place of the model in the package `face_recognition_models`."""


class DlibLandmarks:
    """Finds faces from about 80 / 2^upsample pixels on.

    Args:
        model: a shape predictor with 68 points; None for that of `face-recognition-models`.
        upsample: how many times the image is doubled before the search; each makes it about four times as slow.

    Raises:
        ImportError: the extra is missing.
        FileNotFoundError: no such model.
        ValueError: a negative `upsample`.
    """

    def __init__(self, model: str | Path | None = None, upsample: int = 1) -> None:
        if upsample < 0:
            raise ValueError(f"expected upsample of at least 0; got {upsample}; 1 finds faces from 40 pixels on")
        dlib, path = _dlib(), default_model() if model is None else Path(model)
        if not path.is_file():
            raise FileNotFoundError(f"expected dlib's model with {POINTS} points; got {path}, which is no file")
        try:
            self._fit = dlib.shape_predictor(str(path))
        except RuntimeError as error:
            raise ValueError(f"expected dlib's model with {POINTS} points in {path}; got: {error}") from error
        self._detect, self._upsample = dlib.get_frontal_face_detector(), upsample

    def landmarks(self, frames: Iterable[Pixels]) -> list[Points | None]:
        """See `LandmarkFinder`."""
        return [self._faces(np.ascontiguousarray(frame)) for frame in frames]

    def _faces(self, frame: Pixels) -> Points | None:
        if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3:
            raise ValueError(
                f"expected uint8 RGB (height, width, 3); got {frame.dtype} of shape {frame.shape}; convert it"
            )
        shapes = [self._fit(frame, box).parts() for box in self._detect(frame, self._upsample)]
        faces = [[(point.x, point.y) for point in shape] for shape in shapes]
        return np.array(faces, dtype=np.float64) if faces else None


def default_model() -> Path:
    """The model's file, found without importing its package, which asks for the retired `pkg_resources`."""
    spec = importlib.util.find_spec("face_recognition_models")
    if spec is None or spec.origin is None:
        raise ImportError("finding faces needs a model: pip install 'diffattn[face]', or name a file")
    return Path(spec.origin).parent / MODEL


def _dlib() -> Any:
    try:
        import dlib
    except ImportError as error:
        raise ImportError("finding faces needs dlib: pip install 'diffattn[face]'") from error
    return dlib
