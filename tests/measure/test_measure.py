"""Times in turns, quality by known values, memory within bounds."""

import math
import sys
from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image

from diffattn import ClearAttention, SoftmaxAttention, TokenGrid
from diffattn.measure import (
    Timing,
    attention_share,
    flicker,
    hardware,
    hardware_line,
    latency,
    peak_memory,
    psnr,
    psnr_of_frames,
    ssim,
)


class Clock:
    """A clock that the measured functions move."""

    def __init__(self) -> None:
        self.now = 0.0
        self.calls: list[str] = []

    def __call__(self) -> float:
        return self.now

    def function(self, name: str, *seconds: float) -> Callable[[], None]:
        """Takes these seconds, one call after the other."""
        remaining = list(seconds)

        def run() -> None:
            self.calls.append(name)
            self.now += remaining.pop(0)

        return run


def test_latency_takes_turns_and_leaves_the_warmup_out() -> None:
    clock = Clock()
    functions = {"a": clock.function("a", 100, 1, 2, 6), "b": clock.function("b", 200, 10, 30, 20)}
    timings = latency(functions, rounds=3, warmup=1, clock=clock)
    assert clock.calls == ["a", "b"] * 4
    assert timings["a"].seconds == (1, 2, 6)
    assert (timings["b"].median, timings["b"].min, timings["b"].max) == (20, 10, 30)


def test_latency_refuses_no_rounds() -> None:
    with pytest.raises(ValueError, match="rounds must be at least 1"):
        latency({}, rounds=0)


def test_the_spread_of_a_timing() -> None:
    timing = Timing((1.0, 2.0, 3.0, 4.0, 10.0))
    assert (timing.median, timing.quartiles, timing.iqr) == (3.0, (2.0, 4.0), 2.0)
    assert Timing((0.5,)).iqr == 0
    assert timing.to_dict()["rounds_s"] == [1.0, 2.0, 3.0, 4.0, 10.0]


def test_psnr_of_known_differences() -> None:
    white = np.ones((4, 6, 3))
    assert psnr(white, white) == math.inf
    assert psnr(white, white - 0.1) == pytest.approx(20.0)
    assert psnr(np.full((4, 4, 3), 255, np.uint8), np.full((4, 4, 3), 0, np.uint8)) == pytest.approx(0.0)


def test_psnr_takes_pictures_arrays_and_tensors_alike() -> None:
    a, b = (np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8) for seed in (0, 1))
    want = psnr(a, b)
    assert psnr(Image.fromarray(a), Image.fromarray(b)) == want
    assert psnr(torch.from_numpy(a), torch.from_numpy(b / 255.0)) == pytest.approx(want)


def test_frames_of_a_video_are_compared_each_by_itself() -> None:
    video = np.random.default_rng(0).random((3, 5, 4, 3))
    other = video.copy()
    other[1] -= 0.1
    assert psnr_of_frames(video, other) == (math.inf, pytest.approx(20.0), math.inf)


def test_flicker_is_what_changes_in_time_alone() -> None:
    video = np.random.default_rng(0).random((4, 5, 7, 3))
    assert flicker(video, video + 0.2) == pytest.approx(0.0, abs=1e-12)  # another colour, as steady
    shaken = video.copy()
    shaken[::2] += 0.1  # every difference of frames is off by 0.1
    assert flicker(video, shaken) == pytest.approx(0.1)
    assert flicker(video, video[::-1]) > 0.1
    eight_bit = np.round(255 * video).astype(np.uint8)
    assert flicker(eight_bit, torch.from_numpy(eight_bit)) == 0


@pytest.mark.parametrize("shapes", [((2, 4, 4, 3), (3, 4, 4, 3)), ((4, 4, 3), (4, 4, 3)), ((1, 4, 4, 3), (1, 4, 4, 3))])
def test_videos_of_other_shapes_are_refused(shapes: tuple[tuple[int, ...], ...]) -> None:
    one, other = (np.zeros(shape) for shape in shapes)
    with pytest.raises(ValueError, match="two videos of one shape"):
        flicker(one, other)


def test_psnr_and_ssim_refuse_pictures_of_two_sizes() -> None:
    with pytest.raises(ValueError, match=r"\(4, 4, 3\) and \(4, 5, 3\)"):
        psnr(np.zeros((4, 4, 3)), np.zeros((4, 5, 3)))
    pytest.importorskip("torchmetrics")
    with pytest.raises(ValueError, match="height, width, channels"):
        ssim(np.zeros((16, 16, 3)), np.zeros((16, 17, 3)))


def test_ssim_is_one_only_for_equal_pictures() -> None:
    pytest.importorskip("torchmetrics")
    picture = np.random.default_rng(0).random((32, 32, 3))
    assert ssim(picture, picture) == pytest.approx(1.0)
    assert 0 < ssim(picture, 0.8 * picture + 0.1) < 0.999
    assert ssim(picture, np.random.default_rng(1).random((32, 32, 3))) < 0.2


def test_ssim_names_the_missing_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchmetrics.functional.image", None)
    with pytest.raises(ImportError, match=r"diffattn\[metrics\]"):
        ssim(np.zeros((16, 16, 3)), np.zeros((16, 16, 3)))


def test_peak_memory_sees_what_was_freed_again() -> None:
    with peak_memory() as nothing:
        pass
    if nothing.bytes is None:
        pytest.skip("this system does not tell the peak")
    with peak_memory() as memory:
        torch.ones(64 * 2**20 // 4).sum().item()
    assert memory.bytes is not None
    assert 60 * 2**20 < memory.bytes < 80 * 2**20
    assert nothing.bytes < 4 * 2**20


def test_attention_share_weighs_the_calls_by_their_cost() -> None:
    small, large = TokenGrid(4, 4), TokenGrid(8, 8)
    exact, window = SoftmaxAttention(), ClearAttention(radius=2)
    assert attention_share([(exact, large, 4, 16)]) == 1
    share = attention_share([(window, large, 4, 16), (exact, small, 4, 16)])
    want = window.mask(large).sum() + exact.mask(small).sum()
    assert share == pytest.approx(float(want) / (64**2 + 16**2))
    with pytest.raises(ValueError, match="at least one"):
        attention_share([])


def test_the_hardware_line_says_what_matters() -> None:
    machine = hardware()
    assert machine["torch"] == torch.__version__ and machine["threads"] == torch.get_num_threads()
    for part in (machine["cpu"], f"{machine['threads']} of", "torch"):
        assert part in hardware_line(machine)
