"""Timesteps, first latents and the selection of frames."""

from itertools import pairwise

import pytest
import torch
from diffattn.pipelines.portrait_animation import select_frames
from diffattn.pipelines.portrait_animation.networks.components import official_scheduler
from diffattn.pipelines.portrait_animation.sampling.start import noisy_start, official_timesteps, set_timesteps
from diffusers import LCMScheduler

FAILED = {3, 9, 27, 36, 37, *range(101, 112)}
"""Numbers of steps up to 200 that the released code fails with."""


def test_every_number_of_steps_has_timesteps():
    for steps in range(1, 1001):
        timesteps = official_timesteps(steps)
        assert timesteps[-1] == 1 and timesteps[0] < 1000 and len(timesteps) >= min(steps, 999)
        assert {earlier - later for earlier, later in pairwise(timesteps)} <= {1000 // steps}
    reach_1000 = {steps for steps in range(1, 201) if official_timesteps(steps)[0] == 1000 - 1000 // steps}
    assert reach_1000 == FAILED


@pytest.mark.parametrize("steps", [0, -1, 1001])
def test_a_wrong_number_of_steps_is_refused(steps):
    with pytest.raises(ValueError, match=f"from 1 to 1000 steps; got {steps}"):
        set_timesteps(official_scheduler(), steps, "cpu")


def test_ddim_steps_end_at_the_first_alpha():
    """A prediction of no noise only rescales: by sqrt(abar_0 / abar_start) in all."""
    for steps in (3, 6, 30):
        scheduler = official_scheduler()
        set_timesteps(scheduler, steps, "cpu")
        x = torch.ones(1, 4, 2, 3, dtype=torch.float64)
        for timestep in scheduler.timesteps:
            x = scheduler.step(torch.zeros_like(x), timestep, x).prev_sample
        kept = scheduler.alphas_cumprod
        torch.testing.assert_close(
            x, torch.full_like(x, float((kept[0] / kept[scheduler.timesteps[0]]) ** 0.5)), rtol=1e-6, atol=0
        )


def test_lcm_keeps_its_own_timesteps():
    scheduler = LCMScheduler.from_config(official_scheduler().config)
    set_timesteps(scheduler, 4, "cpu")
    assert len(scheduler.timesteps) == 4 and scheduler.timesteps[0] > 900


def test_the_start_is_the_reference_under_noise():
    z, noise = torch.randn(1, 4, 3, 5), torch.randn(6, 4, 3, 5)
    start = noisy_start(z, noise, official_scheduler())
    torch.testing.assert_close(start, 0.06826492 * z + 0.99766725 * noise, atol=1e-6, rtol=1e-5)


def test_frames_are_selected():
    assert list(select_frames(5)) == [0, 1, 2, 3, 4]
    assert list(select_frames(11, start=2, count=3, skip=4)) == [2, 6, 10]
    assert list(select_frames(11, start=2, count=9, skip=4)) == [2, 6, 10]
    assert list(select_frames(1)) == [0]


@pytest.mark.parametrize(
    "options", [{"start": 5}, {"start": -1}, {"count": -1}, {"skip": 0}, {"count": -2, "official": True}]
)
def test_a_wrong_selection_is_refused(options):
    with pytest.raises(ValueError, match="the video has 5 frames"):
        select_frames(5, **options)


def test_a_selection_of_nothing_is_refused():
    with pytest.raises(ValueError, match="leaves no frame"):
        select_frames(5, start=1, count=-1, official=True)
