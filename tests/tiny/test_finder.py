"""The judge of generated images: it accepts true captions and refuses false ones."""

from dataclasses import replace

import numpy as np
import pytest

from diffattn.tiny.finder import find, largest_blob
from diffattn.tiny.shapes import PALETTE, SIDE, Scene, render, scenes

SCENE = Scene(colour="red", shape="circle", place="at the top left", background="blue")


@pytest.fixture(scope="module")
def truth() -> tuple[list[np.ndarray], list[Scene]]:
    """Jittered images of 60 scenes."""
    rng, world = np.random.default_rng(0), list(scenes())
    chosen = [world[index] for index in rng.choice(len(world), size=60, replace=False)]
    return [render(scene, rng) for scene in chosen], chosen


def test_finds_every_true_caption(truth):
    assert all(find(picture, scene).kept for picture, scene in zip(*truth, strict=True))


def test_shuffled_captions_stay_near_chance(truth):
    pictures, chosen = truth
    kept = [find(picture, scene).kept for picture, scene in zip(pictures, chosen[1:] + chosen[:1], strict=True)]
    assert sum(kept) / len(kept) < 0.05


@pytest.mark.parametrize(
    ("change", "broken"),
    [
        ({"colour": "green"}, "object_kept"),
        ({"place": "at the top"}, "place_kept"),
        ({"place": "at the left"}, "place_kept"),
        ({"background": "purple"}, "background_kept"),
    ],
)
def test_one_false_word_is_enough(change, broken):
    finding = find(render(SCENE), replace(SCENE, **change))
    assert not getattr(finding, broken) and not finding.kept


def test_second_object_of_another_colour_is_refused():
    picture = render(SCENE)
    picture[80:120, 60:120] = PALETTE["green"]
    assert not find(picture, SCENE).object_kept


def test_empty_background_is_refused():
    empty = np.full((SIDE, SIDE, 3), PALETTE["blue"], dtype=np.uint8)
    finding = find(empty, SCENE)
    assert finding.background_kept and finding.area == 0 and not finding.place_kept and not finding.kept


def test_noise_is_refused():
    noise = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    assert not find(noise, SCENE).kept


def test_blob_is_the_largest_connected_part():
    mask = np.array([[1, 1, 0, 0], [0, 1, 0, 1], [1, 0, 0, 1]], dtype=bool)
    expected = np.array([[1, 1, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0]], dtype=bool)
    assert np.array_equal(largest_blob(mask), expected)
    assert not largest_blob(np.zeros((3, 3), dtype=bool)).any()


def test_wrong_size_says_what_to_do():
    with pytest.raises(ValueError, match="generate it at the native size"):
        find(np.zeros((64, 64, 3), dtype=np.uint8), SCENE)
