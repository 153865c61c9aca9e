import math

import pytest
import torch
from diffattn.pipelines.video_sr.cogvideox.scheduler import STARCogVideoXScheduler
from diffusers import CogVideoXDPMScheduler
from tiny_cogvideox import draw


def made(steps=5):
    scheduler = STARCogVideoXScheduler()
    scheduler.set_timesteps(steps)
    return scheduler


def velocity(x, timestep):
    return torch.tanh(x * (1 + int(timestep) / 500))


def sample(scheduler, x, noise):
    """The whole loop without state."""
    before = None
    for step, timestep in enumerate(scheduler.timesteps):
        x0 = scheduler.predict_x0(x, velocity(x, timestep), step)
        x, before = scheduler.update(x, x0, before, step, noise[step] if step < len(noise) else None), x0
    return x


def test_steps_are_honoured_from_pure_noise_on():
    for steps in (1, 2, 7, 50, 99, 1000):
        scheduler = made(steps)
        assert len(scheduler.timesteps) == len(scheduler.signal) == steps
        assert scheduler.timesteps[0] == 999 and scheduler.signal[0] == 0
        assert all(a > b for a, b in zip(scheduler.signal[1:], scheduler.signal, strict=False))
    assert made(50).timesteps.tolist() == list(range(999, 0, -20))
    for steps in (0, 1001):
        with pytest.raises(ValueError, match=f"from 1 to 1000 steps; got {steps}"):
            made(steps)


def test_one_step_gives_the_estimate():
    x, v = draw(1, 2, 3), draw(1, 2, 3, seed=1)
    scheduler = made(1)
    out = scheduler.step(v, scheduler.timesteps[0], x)
    assert torch.equal(out.prev_sample, -v) and torch.equal(out.pred_original_sample, -v)


def test_steps_with_and_without_state_are_the_same_numbers():
    scheduler, x, noise = made(), draw(1, 3, 4, 2, 2), draw(4, 1, 3, 4, 2, 2, seed=1)
    want, given = sample(scheduler, x, noise), x
    for step, timestep in enumerate(scheduler.timesteps):
        last = step == 4
        x, _ = scheduler.step(
            velocity(x, timestep), timestep, x, variance_noise=None if last else noise[step], return_dict=False
        )
    assert torch.equal(x, want)
    blocks = [sample(scheduler, given[:, part], noise[:, :, part]) for part in (slice(2), slice(2, 3))]
    assert torch.equal(torch.cat(blocks, dim=1), want)


def test_a_run_starts_without_the_last_ones_estimate():
    scheduler, noise = made(), draw(4, 2, 2, seed=1)
    runs = []
    for _ in range(2):
        x = draw(2, 2)
        for step, timestep in enumerate(scheduler.timesteps[:3]):
            x = scheduler.step(velocity(x, timestep), timestep, x, variance_noise=noise[step]).prev_sample
        runs.append(x)
    assert torch.equal(*runs)
    middle = scheduler.timesteps[1]
    out = scheduler.step(noise[0], middle, noise[1], variance_noise=noise[2])
    want = scheduler.update(noise[1], out.pred_original_sample, None, 1, noise[2])
    assert torch.equal(out.prev_sample, want)


def test_noise_is_drawn_once_in_every_step_but_the_last():
    scheduler, x = made(3), draw(2, 3)
    generator, reference = (torch.Generator().manual_seed(7) for _ in range(2))
    for timestep in scheduler.timesteps:
        x = scheduler.step(velocity(x, timestep), timestep, x, generator=generator).prev_sample
    noise = [torch.randn(2, 3, generator=reference) for _ in range(2)]
    assert torch.equal(x, sample(scheduler, draw(2, 3), noise))
    assert torch.equal(generator.get_state(), reference.get_state())


def test_steps_are_those_of_diffusers_on_its_own_table():
    """Which is rescaled as a whole; diffusers draws noise twice from the second step on, and uses the second."""
    stock = CogVideoXDPMScheduler(
        rescale_betas_zero_snr=True,
        snr_shift_scale=1.0,
        timestep_spacing="trailing",
        prediction_type="v_prediction",
        clip_sample=False,
    )
    stock.set_timesteps(5)
    scheduler, timesteps = made(5), stock.timesteps.tolist()
    assert timesteps == scheduler.timesteps.tolist()
    torch.testing.assert_close(scheduler.alphas_cumprod, stock.alphas_cumprod)
    table = stock.alphas_cumprod.sqrt()[timesteps].tolist()
    apart = max(abs(a - b) for a, b in zip(table, scheduler.signal, strict=True))
    assert 1e-3 < apart < 2e-2
    scheduler.signal = scheduler.estimated = table
    generator, reference = (torch.Generator().manual_seed(3) for _ in range(2))
    x = draw(2, 3).double()
    got, noise, old = x, [], None
    for step, timestep in enumerate(timesteps):
        earlier = timesteps[step - 1] if step else None
        x, old = stock.step(velocity(x, timestep), old, timestep, earlier, x, generator=generator)
        draws = [torch.randn(2, 3, generator=reference, dtype=torch.float64) for _ in range(2 if step else 1)]
        noise.append(draws[-1])
    torch.testing.assert_close(sample(scheduler, got, noise[:4]), x, atol=1e-12, rtol=1e-12)


def test_estimates_are_read_with_the_nearest_timestep_of_training():
    scheduler, table = made(7), torch.tensor(made(1000).signal)
    for step, (a, read) in enumerate(zip(scheduler.signal, scheduler.estimated, strict=True)):
        assert read == pytest.approx(float(table[(table - a).abs().argmin()]), abs=1e-6)
        x, v = torch.tensor([2.0]), torch.tensor([0.5])
        assert scheduler.predict_x0(x, v, step).item() == pytest.approx(2 * read - 0.5 * math.sqrt(1 - read**2))
    assert scheduler.signal[0] == scheduler.estimated[0] == 0 and scheduler.estimated[1:] != scheduler.signal[1:]
    assert made(1000).estimated == pytest.approx(made(1000).signal, abs=1e-6)


def test_guidance_grows_from_1_and_the_released_one_jumps():
    scheduler = made(50)
    weights = [scheduler.guidance(6.0, step) for step in range(50)]
    assert weights[0] == 1 and weights == sorted(weights) and 6 < weights[-1] < 7
    assert weights[25] == pytest.approx(1 + 3 * (1 - math.cos(math.pi / 32)))
    assert all(scheduler.guidance(0.0, step, official=official) == 1 for step in (0, 49) for official in (False, True))
    released = [scheduler.guidance(6.0, step, official=True) for step in range(50)]
    assert released != sorted(released) and min(released) >= 1 and max(released) <= 7
    assert scheduler.guidance(6.0, 25, exponent=1.0) == pytest.approx(4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_computed_in_float32_or_wider(dtype):
    scheduler, x = made(3), draw(1, 2, 4).to(dtype)
    x0 = scheduler.predict_x0(x, -x, 1)
    assert x0.dtype == torch.promote_types(dtype, torch.float32)
    following = scheduler.update(x, x0, None, 1, x)
    assert following.dtype == dtype
    want = scheduler.update(x.double(), scheduler.predict_x0(x.double(), -x.double(), 1), None, 1, x.double())
    torch.testing.assert_close(following, want.to(dtype))


def test_saved_and_loaded(tmp_path):
    STARCogVideoXScheduler(snr_shift_scale=3.0).save_pretrained(tmp_path)
    loaded = STARCogVideoXScheduler.from_pretrained(tmp_path)
    loaded.set_timesteps(4)
    assert loaded.config.snr_shift_scale == 3 and loaded.signal[1] < made(4).signal[1]


def test_wrong_calls_are_refused():
    scheduler, x = made(3), torch.zeros(2)
    for step, noise in ((0, None), (2, x)):
        with pytest.raises(ValueError, match="noise in every step but the last"):
            scheduler.update(x, x, None, step, noise)
    with pytest.raises(ValueError, match="timesteps in use; got 5"):
        scheduler.step(x, 5, x)
    with pytest.raises(ValueError, match="set_timesteps before"):
        STARCogVideoXScheduler().step(x, 999, x)
