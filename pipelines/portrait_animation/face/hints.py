"""From a driving video and its faces to the two control images of each frame."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Literal

from .alignment import Alignment, Picture, align_faces, best_frame, resize
from .detection import Pixels, Points, scale_points
from .patches import local_control


def control_pictures(
    frames: Iterable[Pixels],
    points: Sequence[Points | None],
    alignment: Alignment | None,
    *,
    height: int = 512,
    width: int = 512,
    scaled: bool = False,
) -> Iterator[tuple[Picture, Picture]]:
    """For each frame the aligned driving image and the local control image, one by one, RGB from 0 to 1.

    Points are moved with the frame; the released code finds them anew in the aligned one.

    Args:
        frames: of the driving video.
        points: a face of each, in pixels of the frame; None blanks the local control.
        alignment: of the resized frames, from `plan_alignment`; None for none.
        height: of the images, in pixels.
        width: likewise.
        scaled: patches as large as the face is; see `patch_boxes`.
    """
    for frame, face in zip(frames, points, strict=True):
        picture = resize(frame, height, width)
        placed = None if face is None else scale_points(face, frame.shape[:2], (height, width))
        if alignment is not None:
            picture = alignment.warp(picture)
            placed = None if placed is None else alignment.move(placed)
        yield picture, local_control(picture, placed, scaled)


def plan_alignment(
    source: Points,
    source_size: tuple[int, int],
    driving: Sequence[Points | None],
    driving_size: tuple[int, int],
    frame: int | Literal["best"] = "best",
    *,
    height: int = 512,
    width: int = 512,
) -> Alignment:
    """The one map for all frames, from the driving frame with number `frame`, or the one nearest to the source.

    Args:
        source: face of the image to animate, in its pixels.
        source_size: height and width of that image.
        driving: faces of the driving frames, in their pixels.
        driving_size: height and width of the driving frames.
        frame: number among `driving`.
        height: of the control images, in pixels.
        width: likewise.

    Raises:
        ValueError: no such frame, or one without a face.
    """
    target = scale_points(source, source_size, (height, width))
    faces = [None if face is None else scale_points(face, driving_size, (height, width)) for face in driving]
    number = best_frame(target, faces) if frame == "best" else frame
    face = faces[number] if 0 <= number < len(faces) else None
    if face is None:
        raise ValueError(f"expected a frame of {len(faces)} that has a face; got number {frame}; take 'best'")
    return align_faces(target, face)
