"""The captioned videos: what they show, how they are split, and how their shapes move."""

import numpy as np
import pytest

from diffattn.tiny import moving
from diffattn.tiny.moving import FRAMES, RADIUS, SIDE, MovingScene, caption, draw_course, held_out_scenes, render
from diffattn.tiny.shapes import PALETTE

SCENE = MovingScene(colour="red", shape="circle", background="blue", motion="sideways")


def test_caption_says_what_it_is_asked_to():
    assert caption(SCENE) == "a red circle moving sideways on a blue background"
    assert caption(SCENE, colour=False, motion=False) == "a circle moving on a blue background"
    assert caption(SCENE, colour=False, shape=False, motion=False) == "a shape moving on a blue background"


def test_every_scene_has_a_caption_of_its_own():
    world = list(moving.scenes())
    assert len(world) == 5 * 4 * 4 * 2
    assert len({caption(scene) for scene in world}) == len(world)


def test_about_a_tenth_is_held_out_whatever_the_motion():
    held_out = [scene for scene in moving.scenes() if moving.is_held_out(scene)]
    assert 0.05 < len(held_out) / len(list(moving.scenes())) < 0.15
    assert len(held_out) == 2 * len({(scene.colour, scene.shape, scene.background) for scene in held_out})


def test_held_out_draw_is_seeded_and_distinct():
    assert held_out_scenes(8, seed=3) == held_out_scenes(8, seed=3) != held_out_scenes(8, seed=4)
    assert len(set(held_out_scenes(12))) == 12 and all(map(moving.is_held_out, held_out_scenes(12)))


@pytest.mark.parametrize("motion", moving.MOTIONS)
def test_shapes_stay_inside_and_move_smoothly_however_long(motion):
    scene = MovingScene(colour="red", shape="circle", background="blue", motion=motion)
    course = draw_course(scene, np.random.default_rng(0))
    places = course.centres(200)
    assert places.min() > RADIUS and places.max() < SIDE - RADIUS
    assert np.ptp(places[:, scene.axis]) > 9 and np.ptp(places[:, 1 - scene.axis]) == 0
    assert np.linalg.norm(np.diff(places, n=2, axis=0), axis=1).max() < 0.2


def test_render_draws_the_colour_where_the_course_says():
    course = draw_course(SCENE, np.random.default_rng(0))
    video = render(SCENE, course)
    assert video.shape == (FRAMES, SIDE, SIDE, 3) and video.dtype == np.uint8
    for frame, (x, y) in zip(video, course.centres(FRAMES), strict=True):
        assert tuple(frame[int(y), int(x)]) == PALETTE["red"]
        assert tuple(frame[0, 0]) == tuple(frame[-1, -1]) == PALETTE["blue"]


def test_render_random_follows_its_seed():
    assert np.array_equal(moving.render_random(SCENE, 1), moving.render_random(SCENE, 1))
    assert not np.array_equal(moving.render_random(SCENE, 1), moving.render_random(SCENE, 2))


def test_scene_refuses_what_it_cannot_draw():
    with pytest.raises(ValueError, match="expected motion to be one of sideways, .* got 'round'"):
        MovingScene(colour="red", shape="circle", background="blue", motion="round")
    with pytest.raises(ValueError, match="unlike the background"):
        MovingScene(colour="blue", shape="circle", background="blue")
    with pytest.raises(ValueError, match="expected a count from 1"):
        held_out_scenes(0)
