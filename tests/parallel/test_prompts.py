"""Prompts as a function of the frame."""

import pytest
import torch

from diffattn.parallel.prompts import frame_prompts, hold


def test_prompts_lie_on_a_line_between_their_frames() -> None:
    first, second = torch.randn(2, 5, 3), torch.randn(2, 5, 3)
    got = frame_prompts({2: first, 6: second}, range(9))
    assert got.shape == (2, 9, 5, 3)
    shares = [0, 0, 0, 0.25, 0.5, 0.75, 1, 1, 1]
    want = torch.stack([(1 - share) * first + share * second for share in shares], dim=1)
    torch.testing.assert_close(got, want)


def test_an_interpolation_can_be_given() -> None:
    got = frame_prompts({0: torch.zeros(1, 1), 2: torch.ones(1, 1)}, [0, 1, 2, 3], hold)
    assert got.flatten().tolist() == [0, 0, 1, 1]


def test_a_clip_gets_its_part() -> None:
    prompts = {0: torch.randn(4, 3), 3: torch.randn(4, 3), 11: torch.randn(4, 3)}
    assert torch.equal(frame_prompts(prompts, range(12))[5:8], frame_prompts(prompts, range(5, 8)))


def test_wrong_prompts_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one"):
        frame_prompts({}, [0])
    with pytest.raises(ValueError, match="one shape"):
        frame_prompts({0: torch.zeros(2, 3), 1: torch.zeros(3, 3)}, [0])
