"""Noise by seed, frame and step alone."""

import math

import pytest
import torch

from diffattn.parallel.operations.noise import FrameNoise, philox

KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]
"""Counter, key, words: the known answers that come with the authors' Random123."""


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN)
def test_philox_gives_its_known_answers(counter: tuple[int, ...], key: tuple[int, int], words: tuple[int, ...]) -> None:
    assert tuple(int(word) for word in philox([torch.tensor(word) for word in counter], key)) == words


def test_frames_do_not_depend_on_who_draws_them() -> None:
    noise = FrameNoise(3)
    whole = noise.draw(range(10), (2, 4, 3, 5), dim=2)
    assert whole.shape == (2, 4, 10, 3, 5)
    for frames in ([0], [9, 4], range(3, 7)):
        assert torch.equal(noise.draw(frames, (2, 4, 3, 5), dim=2), whole[:, :, list(frames)])


def test_a_sample_does_not_depend_on_those_after_it() -> None:
    noise = FrameNoise(3)
    assert torch.equal(noise.draw([1], (1, 4, 3))[:, 0], noise.draw([1], (2, 4, 3))[:, 0])


def test_a_dtype_is_a_rounding_and_the_global_generator_rests() -> None:
    state = torch.get_rng_state()
    noise = FrameNoise(3)
    single = noise.draw([2], (7,))
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        assert torch.equal(noise.draw([2], (7,), dtype=dtype), single.to(dtype))
    assert torch.equal(torch.get_rng_state(), state)


def test_no_seed_frame_or_step_shares_numbers_with_another() -> None:
    draws = [
        FrameNoise(seed).draw([frame], (64,), step=step).flatten()
        for seed in (0, 1, 2, 2**32, 2**32 + 1)
        for frame in (0, 1, 2)
        for step in (0, 1, 2)
    ]
    numbers = torch.cat(draws)
    assert len(numbers.unique()) > 0.999 * len(numbers)
    correlation = torch.corrcoef(torch.stack(draws))
    assert float((correlation - torch.eye(len(draws))).abs().max()) < 0.6


def test_numbers_are_unit_normal() -> None:
    x = FrameNoise(5).draw(range(20), (10001,), step=4)
    assert abs(float(x.mean())) < 0.01 and abs(float(x.std()) - 1) < 0.01
    assert abs(float((x**4).mean()) - 3) < 0.1
    assert abs(float((x < 1).double().mean()) - 0.5 * (1 + math.erf(2**-0.5))) < 0.005
    neighbours = (x[:, 1:] * x[:, :-1]).mean()
    assert abs(float(neighbours)) < 0.01 and abs(float((x[1:] * x[:-1]).mean())) < 0.01


@pytest.mark.parametrize("seed", [-1, 2**64, 1.5, True])
def test_a_wrong_seed_is_refused(seed: int) -> None:
    with pytest.raises(ValueError, match="seed must be an int"):
        FrameNoise(seed)


def test_a_wrong_frame_or_step_is_refused() -> None:
    with pytest.raises(ValueError, match="frames must be numbers"):
        FrameNoise(0).draw([-1], (2,))
    with pytest.raises(ValueError, match="step must be numbers"):
        FrameNoise(0).draw([1], (2,), step=-1)
