"""How far videos are apart, in figures and as strips."""

import math

import numpy as np
import pytest
from PIL import Image

from diffattn.measure.strips import MOST_FRAMES, VideoDistance, strips


def video(frames: int = 20) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 200, (frames, 6, 8, 3), dtype=np.uint8)


def test_the_worst_frame_is_named() -> None:
    other = video()
    other[7] += 51  # a fifth of the range
    distance = VideoDistance.between(other, video())
    assert distance.worst == 7 and distance.psnr[7] == pytest.approx(-20 * math.log10(0.2))
    assert distance.flicker > 0 and math.isinf(distance.psnr[0])
    other += 5
    told = str(VideoDistance.between(other, video()))
    assert "(frame 7)" in told and "flicker" in told


def test_equal_videos_are_said_to_be() -> None:
    assert str(VideoDistance.between(video(), video())) == "identical"
    assert math.isnan(VideoDistance.between(video(1), video(1)).flicker)


def test_strips_have_the_first_and_the_last_frame_and_the_errors() -> None:
    frames = [Image.fromarray(frame) for frame in video(33)]
    other = video(33)
    other[32] += 40
    drawn = strips(frames, {"one": other, "two": frames}, name="full", side=64)
    single = strips(frames, {}, name="full", side=64)
    assert drawn.width == single.width > MOST_FRAMES * 64 and drawn.height > 2 * single.height
    few = strips(frames[:3], {}, name="full", side=64)
    assert few.width < single.width
    changed = strips(frames, {"one": frames, "two": frames}, name="full", side=64)
    where = np.argwhere((np.asarray(drawn) != np.asarray(changed)).any(-1))
    assert len(where) and where[:, 1].min() > drawn.width * 0.8  # in the column of the last frame alone
