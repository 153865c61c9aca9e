"""Landmarks by MediaPipe's face landmarker, from a model file that the user names (`face_landmarker.task`).

MediaPipe is no dependency of this library, not even an optional one: install `mediapipe` 1.2 or later beside it.
Of the mesh's 478 points those are taken that lie nearest to iBUG's; the jaw's follow the mesh's outline and so lie
somewhat further out in turned faces.
Source: Kartynnik et al., Real-time Facial Surface Geometry from Monocular Video on Mobile GPUs, 2019.
"""

import importlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from diffattn.pipelines.portrait_animation.face.detection import Pixels, Points

MESH = (
    *(127, 234, 132, 58, 136, 150, 176, 148, 152, 377, 400, 379, 365, 288, 361, 454, 356),
    *(70, 63, 105, 66, 107, 336, 296, 334, 293, 300),
    *(168, 6, 195, 4, 98, 97, 2, 326, 327),
    *(33, 160, 158, 133, 153, 144, 362, 385, 387, 263, 373, 380),
    *(61, 39, 37, 0, 267, 269, 291, 405, 314, 17, 84, 181, 78, 82, 13, 312, 308, 317, 14, 87),
)
"""Number in the mesh of each of the 68 points."""


class MediapipeLandmarks:
    """Finds up to `faces` faces in each frame.

    Raises:
        FileNotFoundError: no such model.
        ImportError: `mediapipe` is missing.
    """

    def __init__(self, model: str | Path, faces: int = 1) -> None:
        if not Path(model).is_file():
            raise FileNotFoundError(
                f"expected MediaPipe's face landmarker; got {model}, which is no file; name its .task"
            )
        self._mediapipe = _mediapipe()
        tasks = self._mediapipe.tasks
        options = tasks.vision.FaceLandmarkerOptions(
            base_options=tasks.BaseOptions(model_asset_path=str(model)), num_faces=faces
        )
        self._landmarker = tasks.vision.FaceLandmarker.create_from_options(options)

    def landmarks(self, frames: Iterable[Pixels]) -> list[Points | None]:
        """See `LandmarkFinder`."""
        return [self._faces(np.ascontiguousarray(frame)) for frame in frames]

    def _faces(self, frame: Pixels) -> Points | None:
        image = self._mediapipe.Image(image_format=self._mediapipe.ImageFormat.SRGB, data=frame)
        height, width = frame.shape[:2]
        meshes = self._landmarker.detect(image).face_landmarks
        faces = [[(mesh[number].x * width, mesh[number].y * height) for number in MESH] for mesh in meshes]
        return np.array(faces, dtype=np.float64) if faces else None


def _mediapipe() -> Any:
    try:
        return importlib.import_module("mediapipe")
    except ImportError as error:
        raise ImportError("these landmarks need MediaPipe: pip install 'mediapipe>=1.2'") from error
