"""Control images of a driving video."""

import numpy as np
import pytest
from diffattn.pipelines.portrait_animation.face.alignment import align_faces, resize
from diffattn.pipelines.portrait_animation.face.detection import scale_points
from diffattn.pipelines.portrait_animation.face.hints import control_pictures, plan_alignment
from diffattn.pipelines.portrait_animation.face.patches import local_control

FRAMES = np.random.default_rng(0).integers(0, 256, (3, 45, 71, 3), dtype=np.uint8)


def face(x: float, y: float, width: float, height: float) -> np.ndarray:
    return np.random.default_rng(1).random((68, 2)) * (width, height) + (x, y)


SOURCE, DRIVING = face(20.0, 30.0, 40.0, 50.0), [face(20.0, 10.0, 30.0, 20.0), None, face(4.0, 12.0, 20.0, 30.0)]
SIZES = {"height": 64, "width": 80}


def plan(**options: object) -> object:
    return plan_alignment(SOURCE, (100, 90), DRIVING, (45, 71), **options, **SIZES)


def test_the_chosen_face_comes_to_lie_on_the_sources() -> None:
    moved = plan(frame=2).move(scale_points(DRIVING[2], (45, 71), (64, 80)))
    want = scale_points(SOURCE, (100, 90), (64, 80))
    np.testing.assert_allclose(moved.mean(0), want.mean(0))
    np.testing.assert_allclose(np.ptp(moved, axis=0), np.ptp(want, axis=0))
    assert plan() in (plan(frame=0), plan(frame=2)) and plan(frame=0) != plan(frame=2)


@pytest.mark.parametrize("number", [1, 3, -1])
def test_a_frame_without_a_face_is_refused(number: int) -> None:
    with pytest.raises(ValueError, match=f"expected a frame of 3 that has a face; got number {number}"):
        plan(frame=number)


@pytest.mark.parametrize("scaled", [False, True])
def test_pictures_and_patches_are_moved_together(scaled: bool) -> None:
    alignment = plan(frame=0)
    pairs = list(control_pictures(FRAMES, DRIVING, alignment, scaled=scaled, **SIZES))
    assert len(pairs) == 3
    for frame, points, (pose, local) in zip(FRAMES, DRIVING, pairs, strict=True):
        np.testing.assert_array_equal(pose, alignment.warp(resize(frame, 64, 80)))
        placed = None if points is None else alignment.move(scale_points(points, (45, 71), (64, 80)))
        np.testing.assert_array_equal(local, local_control(pose, placed, scaled))
    assert not pairs[1][1].any() and pairs[1][0].any() and pairs[0][1].any()


def test_without_alignment_frames_are_resized_only() -> None:
    pose, local = next(control_pictures(iter(FRAMES), DRIVING, None, **SIZES))
    np.testing.assert_array_equal(pose, resize(FRAMES[0], 64, 80))
    np.testing.assert_array_equal(local, local_control(pose, scale_points(DRIVING[0], (45, 71), (64, 80))))


def test_frames_without_their_points_are_refused() -> None:
    with pytest.raises(ValueError, match="shorter"):
        list(control_pictures(FRAMES, DRIVING[:2], None, **SIZES))


def test_the_size_of_frames_may_differ_from_that_of_points_of_the_source() -> None:
    same = align_faces(*(scale_points(SOURCE, (100, 90), (64, 80)),) * 2)
    double = plan_alignment(SOURCE, (100, 90), [SOURCE * 2], (200, 180), **SIZES)
    np.testing.assert_allclose([*double.scale, *double.shift], [*same.scale, *same.shift], atol=1e-9)
