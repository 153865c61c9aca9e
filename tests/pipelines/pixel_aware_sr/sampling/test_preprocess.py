"""Sizes that images are restored at."""

import math

import numpy as np
import pytest
from diffattn.pipelines.pixel_aware_sr.sampling.preprocess import prepare, restore_size, target_size
from PIL import Image

SIZES = [(1, 1), (7, 40), (40, 7), (96, 96), (97, 300), (641, 200), (1, 3000)]


def picture(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("task", ["realisr", "grayscale"])
@pytest.mark.parametrize(("width", "height"), SIZES)
def test_sides_are_multiples_of_8_and_the_same_turned(width: int, height: int, task: str) -> None:
    rules = {"upscale": 1, "process_size": 100, "task": task}
    wide, high = target_size(width, height, **rules)
    assert wide % 8 == high % 8 == 0 and min(wide, high) >= 8
    assert target_size(height, width, **rules) == (high, wide)
    if task == "realisr":
        assert min(wide, high) >= 96
    else:
        assert max(wide, high) <= 200


@pytest.mark.parametrize(
    ("size", "upscale", "want"),
    [
        ((100, 130), 1, (96, 128)),  # long enough: only brought down
        ((99, 130), 1, (96, 128)),  # 100 x 131 on the way
        ((50, 70), 2, (96, 136)),  # 100 x 140: the upscale was enough
        ((62, 94), 1, (96, 144)),  # 100 * 94 // 62 = 151
        ((33, 1000), 2, (96, 3024)),  # 100 * 2000 // 66 = 3030
        ((67, 90), 1.55, (104, 136)),  # 103.85 x 139.5, rounded
    ],
)
def test_restoring_scales_and_then_brings_small_pictures_up(
    size: tuple[int, int], upscale: float, want: tuple[int, int]
) -> None:
    assert target_size(*size, upscale=upscale, process_size=100, task="realisr") == want


def test_gray_pictures_have_a_longest_side_and_no_upscale() -> None:
    rules = {"process_size": 100, "task": "grayscale"}
    assert target_size(400, 300, upscale=1, **rules) == target_size(400, 300, upscale=4, **rules) == (128, 96)
    assert target_size(1000, 200, upscale=1, **rules) == (200, 40)
    once, thrice = (np.asarray(prepare(picture(40, 30), upscale=upscale, **rules)) for upscale in (1, 3))
    assert np.array_equal(once, thrice)


@pytest.mark.parametrize("task", ["realisr", "grayscale"])
@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA"])
def test_a_prepared_picture_is_rgb_of_the_target_size(mode: str, task: str) -> None:
    rules = {"upscale": 2, "process_size": 64, "task": task}
    out = prepare(picture(31, 45).convert(mode), **rules)
    assert out.mode == "RGB" and out.size == target_size(31, 45, **rules)
    pixels = np.asarray(out)
    assert (np.ptp(pixels, axis=-1).max() == 0) == (task == "grayscale" or mode == "L")


def test_a_picture_of_the_right_size_is_left_alone() -> None:
    given = picture(64, 72)
    out = prepare(given, upscale=1, process_size=64, task="realisr")
    assert np.array_equal(np.asarray(out), np.asarray(given))


def test_the_whole_picture_is_squeezed_not_cropped() -> None:
    columns = np.zeros((64, 71, 3), dtype=np.uint8)
    columns[:, -3:] = 255
    out = np.asarray(prepare(Image.fromarray(columns), upscale=1, process_size=64, task="realisr"))
    assert out.shape == (64, 64, 3) and out[:, -1].min() > 250 and out[:, :55].max() < 5


@pytest.mark.parametrize("upscale", [1, 2, 1.5])
def test_the_size_is_restored(upscale: float) -> None:
    out = prepare(picture(31, 45), upscale=upscale, process_size=64, task="realisr")
    assert restore_size(out, 31, 45, upscale).size == (round(31 * upscale), round(45 * upscale))


@pytest.mark.parametrize("upscale", [0, -1, math.nan, math.inf])
def test_a_wrong_upscale_is_refused(upscale: float) -> None:
    for task in ("realisr", "grayscale"):
        with pytest.raises(ValueError, match="expected an upscale above 0"):
            prepare(picture(9, 9), upscale=upscale, process_size=64, task=task)
    with pytest.raises(ValueError, match="expected an upscale above 0"):
        restore_size(picture(9, 9), 9, 9, upscale)


def test_a_wrong_task_or_process_size_is_refused() -> None:
    with pytest.raises(ValueError, match="task of realisr, grayscale; got 'sr'"):
        target_size(9, 9, upscale=1, process_size=64, task="sr")
    with pytest.raises(ValueError, match="process_size of at least 8 pixels; got 7"):
        target_size(9, 9, upscale=1, process_size=7, task="realisr")
