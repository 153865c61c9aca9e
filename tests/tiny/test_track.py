"""The judging programs: they read procedural videos without fault, and notice each way in which one can be wrong."""

import itertools

import numpy as np
import pytest

from diffattn.tiny import moving
from diffattn.tiny.evaluate_video import described
from diffattn.tiny.moving import MOVING_SHAPES, Course, MovingScene, render, render_random
from diffattn.tiny.shapes import PALETTE
from diffattn.tiny.track import accelerations, figures, follow, motion, sight

SCENE = MovingScene(colour="red", shape="circle", background="blue", motion="sideways")


def course(start: float = 0.0, lane: float = 24.0) -> Course:
    """A horizontal course that is at the middle of its line at frame -start."""
    return Course(axis=0, lane=lane, period=40, start=start)


@pytest.mark.parametrize("shape", MOVING_SHAPES)
def test_sees_colour_shape_background_and_place_of_every_pair_of_colours(shape):
    pairs = itertools.permutations(moving.MOVING_COLOURS, 2)
    for index, (colour, background) in enumerate(pairs):
        scene = MovingScene(colour=colour, shape=shape, background=background)
        there = Course(axis=index % 2, lane=16.3 + index % 16, period=40, start=1.7 * index)
        seen = sight(render(scene, there, 1)[0])
        assert (seen.colour, seen.shape, seen.background, seen.clean) == (colour, shape, background, True)
        assert seen.fit > 0.95


def test_places_are_right_to_a_fraction_of_a_pixel():
    seen = follow(render(SCENE, course(-5.0), 40))
    assert np.abs(np.array([sighting.centre for sighting in seen]) - course(-5.0).centres(40)).max() < 0.1


def test_a_whole_video_is_one_object_moving_smoothly():
    for index, scene in enumerate(moving.held_out_scenes(8)):
        seen = follow(render_random(scene, index))
        found = figures(seen, seams=(8,))
        assert found.identity == found.background_identity == found.clean == 1.0
        assert found.worst_acceleration < 1.0
        assert motion(follow(render_random(scene, index, 40))) == scene.motion


def test_another_object_after_a_seam_costs_identity():
    other = MovingScene(colour="yellow", shape="square", background="blue")
    seen = follow(np.concatenate([render(SCENE, course(), 12), render(other, course(12.0), 4)]))
    found = figures(seen, seams=(12,))
    assert found.colour_identity == found.shape_identity == found.identity == 0.75
    assert found.background_identity == found.clean == 1.0


def test_a_jump_is_counted_at_its_seam_only():
    seen = follow(np.concatenate([render(SCENE, course(), 8), render(SCENE, course(8.0, lane=17.0), 8)]))
    with_seam, without = figures(seen, seams=(8,)), figures(seen)
    assert with_seam.seam_acceleration > 6.0 and with_seam.acceleration < 0.6
    assert np.isnan(without.seam_acceleration) and without.acceleration > 0.8
    assert with_seam.worst_acceleration == without.worst_acceleration == accelerations(seen)[6:8].max()


def test_two_objects_a_smear_or_a_dirty_ground_are_not_clean():
    frame = render(SCENE, course(5.0), 1)[0]
    two, smeared = frame.copy(), frame.copy()
    two[:9, :9] = PALETTE["yellow"]
    smeared[18:30, 2:46] = PALETTE["red"]
    dirty = np.clip(frame.astype(int) + 45 * np.array([1, 1, 0]), 0, 255).astype(np.uint8)
    assert sight(frame).clean
    for wrong in (two, smeared, dirty):
        assert not sight(wrong).clean


def test_an_empty_frame_shows_nothing():
    empty = np.broadcast_to(np.array(PALETTE["blue"], dtype=np.uint8), (48, 48, 3))
    seen = sight(empty)
    assert (seen.background, seen.colour, seen.shape, seen.clean) == ("blue", "", "", False)
    video = render(SCENE, course(), 16)
    video[5] = empty
    found = figures(follow(video))
    assert found.identity == found.clean == 15 / 16 and found.acceleration < 0.6
    assert figures([seen] * 4).identity == 0.0


def test_no_motion_where_it_is_short_or_slants():
    assert motion(follow(render(SCENE, course(8.0), 5))) is None
    slanted = np.concatenate([render(SCENE, course(-8.0, lane=18.0), 1), render(SCENE, course(8.0, lane=30.0), 1)])
    assert motion(follow(slanted)) is None


def test_follow_and_figures_refuse_what_they_cannot_judge():
    with pytest.raises(ValueError, match="expected a uint8 video .* got float64"):
        follow(np.zeros((2, 48, 48, 3)))
    with pytest.raises(ValueError, match="expected seams from 1 to 15"):
        figures(follow(render(SCENE, course(), 16)), seams=(16,))


def test_a_video_is_described_in_words() -> None:
    assert described(render_random(SCENE, 0, 33)) == (
        "a red circle on blue, the same in 100% of the frames, moving sideways"
    )
    assert described(np.zeros((3, 48, 48, 3), np.uint8) + np.uint8(255)) == "nothing on white"
