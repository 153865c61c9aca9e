"""The captioned images: what they contain, how they are split, and how they are drawn."""

import numpy as np
import pytest

from diffattn.tiny.shapes import PALETTE, SIDE, Scene, caption, captions, held_out_scenes, is_held_out, render, scenes

SCENE = Scene(colour="red", shape="circle", place="at the top left", background="blue", texture="striped")


def test_every_scene_has_captions_of_its_own():
    world = list(scenes())
    assert len(world) == 8 * 7 * 6 * 9 * 2 * 2
    assert len({caption(scene) for scene in world}) == len(world)


def test_captions_name_the_scene():
    assert caption(SCENE) == "a large red circle at the top left on a striped blue background"
    for text in captions(SCENE):
        assert all(word in text.lower() for word in ("red", "circle", "top left", "striped", "blue"))


def test_about_a_tenth_is_held_out_whatever_the_size_and_texture():
    held_out = [scene for scene in scenes() if is_held_out(scene)]
    assert 0.08 < len(held_out) / len(list(scenes())) < 0.12
    combinations = {(scene.colour, scene.shape, scene.place, scene.background) for scene in held_out}
    assert len(held_out) == 4 * len(combinations)


def test_held_out_draw_is_seeded_and_distinct():
    assert held_out_scenes(64, seed=3) == held_out_scenes(64, seed=3)
    assert held_out_scenes(64, seed=3) != held_out_scenes(64, seed=4)
    assert len(set(held_out_scenes(64))) == 64 and all(map(is_held_out, held_out_scenes(64)))


def test_render_puts_the_colour_at_the_place():
    picture = render(SCENE)
    assert picture.shape == (SIDE, SIDE, 3) and picture.dtype == np.uint8
    assert tuple(picture[27, 27]) == PALETTE["red"] and tuple(picture[127, 127]) != PALETTE["red"]


def test_render_jitter_follows_the_generator():
    first, again = (render(SCENE, np.random.default_rng(1)) for _ in range(2))
    assert np.array_equal(first, again) and not np.array_equal(first, render(SCENE))


def test_scene_refuses_what_it_cannot_draw():
    with pytest.raises(ValueError, match="expected colour to be one of red, .* got 'mauve'"):
        Scene(colour="mauve", shape="circle", place="at the top", background="blue")
    with pytest.raises(ValueError, match="unlike the background"):
        Scene(colour="blue", shape="circle", place="at the top", background="blue")
    with pytest.raises(ValueError, match="expected a count from 1"):
        held_out_scenes(0)
