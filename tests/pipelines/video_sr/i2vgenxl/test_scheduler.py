import hashlib
import math

import pytest
import torch
from diffattn.pipelines.video_sr.i2vgenxl.scheduler import STARScheduler, fast_times, logsnr_sigmas, trailing_times
from diffusers import DPMSolverMultistepScheduler
from torch import Tensor

SHAPE = (2, 4, 3, 5, 7)
EVALUATIONS = [("fast", 1), ("fast", 2), ("fast", 5), ("fast", 14), ("fast", 30), ("trailing", 1), ("trailing", 15)]


def normal(seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def scheduler_with(steps: int, **settings: object) -> STARScheduler:
    scheduler = STARScheduler(**settings)
    scheduler.set_timesteps(steps)
    return scheduler


def stock_for(scheduler: STARScheduler, dtype: torch.dtype = torch.float64) -> DPMSolverMultistepScheduler:
    """The stock solver with the same sigmas, fed with x0 instead of v."""
    stock = DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++", prediction_type="sample", solver_order=2)
    stock.set_timesteps(len(scheduler.timesteps))
    stock.timesteps, stock.sigmas = scheduler.timesteps, scheduler.sigmas.to(dtype)
    return stock


def test_table_runs_from_the_scale_of_little_noise_to_pure_noise() -> None:
    sigmas = logsnr_sigmas(1000, 2.0, 4.0)
    assert sigmas.dtype == torch.float32 and sigmas[-1] == 1.0 and bool((sigmas.diff() > 0).all())
    assert sigmas[[0, 500, 899]].tolist() == pytest.approx([0.0011, 0.9430, 0.9991], abs=5e-5)
    logsnr = ((1 - sigmas[0] ** 2) / sigmas[0] ** 2).log()
    assert float(logsnr) == pytest.approx(15 + 2 * math.log(1 / 2.0), abs=1e-2)


def test_tables_are_the_same_on_every_cpu() -> None:
    """Their bytes, as found with torch's kernels for AVX-512, for AVX2 and for neither (`ATEN_CPU_CAPABILITY`)."""
    scheduler = scheduler_with(15)
    tables = (scheduler.sigma_t, scheduler.alpha_t, scheduler.sigmas, scheduler.lambda_t)
    assert [hashlib.sha256(table.numpy().tobytes()).hexdigest()[:16] for table in tables] == [
        "99b6dfa56f12f97d",
        "0a6b5b8a25dc8854",
        "a9f0b42a22d4ede2",
        "08b6c0f24697ddb8",
    ]


def test_tables_of_the_scheduler_agree_with_each_other() -> None:
    scheduler = STARScheduler()
    torch.testing.assert_close(scheduler.alpha_t**2 + scheduler.sigma_t**2, torch.ones(1000))
    torch.testing.assert_close(scheduler.alphas.cumprod(0), scheduler.alphas_cumprod, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(scheduler.betas, 1 - scheduler.alphas)
    assert scheduler.alphas_cumprod[-1] == 0 and scheduler.sigmas[899] == pytest.approx(23.4717, abs=1e-3)


@pytest.mark.parametrize(("mode", "steps"), EVALUATIONS)
def test_steps_are_as_many_as_asked_for(mode: str, steps: int) -> None:
    scheduler = scheduler_with(steps, mode=mode)
    assert len(scheduler.timesteps) == scheduler.num_inference_steps == steps
    assert len(scheduler.sigmas) == steps + 1 and scheduler.sigmas[-1] == 0
    assert scheduler.timesteps[0] == 899 and scheduler.timesteps.dtype == torch.int64
    assert bool((scheduler.timesteps.diff() < 0).all()) and bool((scheduler.sigmas.diff() < 0).all())


def test_default_number_of_steps_in_fast_mode_makes_the_released_fourteen() -> None:
    default, honest = scheduler_with(15), scheduler_with(14)
    assert default.timesteps.tolist() == honest.timesteps.tolist() and len(default.timesteps) == 14
    assert torch.equal(default.sigmas, honest.sigmas)
    assert len(scheduler_with(16).timesteps) == 16


def test_fast_mode_keeps_four_of_fifteen_above_the_split() -> None:
    times = fast_times(899, 30)
    assert sum(time > 500 for time in times) == 8 and times[8] == 500 and len(times) == 30
    assert fast_times(700, 2) == [700, 500]


def test_solver_takes_fractions_where_the_network_takes_whole_timesteps() -> None:
    scheduler = scheduler_with(15, mode="trailing")
    times = trailing_times(899, 16)
    assert times[1] == 842.75 and scheduler.timesteps[1] == 843
    low, high = scheduler.sigma_t / scheduler.alpha_t, (scheduler.sigma_t / scheduler.alpha_t).roll(-1)
    want = low[842] ** 0.25 * high[842] ** 0.75
    assert float(scheduler.sigmas[1]) == pytest.approx(float(want), rel=1e-5)


def test_start_lies_where_it_is_put() -> None:
    scheduler = scheduler_with(4, mode="trailing", t_start=300)
    assert scheduler.timesteps.tolist() == [300, 240, 180, 119]
    z, noise = normal(0), normal(1)
    want = scheduler.alpha_t[300] * z + scheduler.sigma_t[300] * noise
    torch.testing.assert_close(scheduler.noised(z, noise), want)
    torch.testing.assert_close(scheduler.start(want), scheduler.sigma_t[300] * want)


def test_add_noise_takes_a_timestep_for_each_sample() -> None:
    scheduler, z, noise = STARScheduler(), normal(0), normal(1)
    got = scheduler.add_noise(z, noise, torch.tensor([0, 999]))
    torch.testing.assert_close(got[0], scheduler.alpha_t[0] * z[0] + scheduler.sigma_t[0] * noise[0])
    torch.testing.assert_close(got[1], noise[1])


@pytest.mark.parametrize(("mode", "steps"), EVALUATIONS)
def test_update_is_the_stock_solver(mode: str, steps: int) -> None:
    scheduler = scheduler_with(steps, mode=mode)
    stock = stock_for(scheduler)
    x, before = normal(0, torch.float64), None
    for step in range(steps):
        x0, noise = normal(10 + step, torch.float64), normal(100 + step, torch.float64)
        stock._step_index = step
        if before is None or step == steps - 1:
            want = stock.dpm_solver_first_order_update(x0, sample=x, noise=noise)
        else:
            want = stock.multistep_dpm_solver_second_order_update([before, x0], sample=x, noise=noise)
        x, before = scheduler.update(x, x0, before, step, noise), x0
        torch.testing.assert_close(x, want, rtol=1e-11, atol=1e-11)


def test_whole_loop_is_the_stock_loop() -> None:
    scheduler = scheduler_with(9)
    stock, x = stock_for(scheduler, torch.float32), normal(0)
    same = x
    for step, timestep in enumerate(scheduler.timesteps):
        v, noise = normal(10 + step), normal(100 + step)
        x0 = scheduler.predict_x0(x, v, step)
        want = stock.step(x0, timestep, same, variance_noise=noise).prev_sample
        x, same = scheduler.step(v, timestep, x, variance_noise=noise).prev_sample, want
        torch.testing.assert_close(x, want, rtol=1e-4, atol=1e-4)


def test_blocks_of_frames_give_the_numbers_of_step() -> None:
    scheduler, x = scheduler_with(6), normal(0)
    blocks, before = list(x.split(2, dim=2)), [None, None]
    for step, timestep in enumerate(scheduler.timesteps):
        v, noise = normal(10 + step), normal(100 + step)
        (x,) = scheduler.step(v, timestep, x, variance_noise=noise, return_dict=False)
        for k, (part, drawn) in enumerate(zip(v.split(2, dim=2), noise.split(2, dim=2), strict=True)):
            x0 = scheduler.predict_x0(scheduler.model_input(blocks[k], step), part, step)
            last = step == len(scheduler.timesteps) - 1
            blocks[k] = scheduler.update(blocks[k], x0, before[k], step, None if last else drawn)
            before[k] = x0
        assert torch.equal(torch.cat(blocks, dim=2), x)


def test_last_step_gives_x0() -> None:
    scheduler, x, v = scheduler_with(3), normal(0), normal(1)
    x0 = scheduler.predict_x0(x, v, 2)
    assert torch.equal(scheduler.update(x, x0, normal(2), 2, None), x0)


def test_x0_takes_the_table_at_the_whole_timestep() -> None:
    scheduler, x, v = scheduler_with(15), normal(0), normal(1)
    want = scheduler.alpha_t[454] * x - scheduler.sigma_t[454] * v
    assert scheduler.timesteps[5] == 454
    torch.testing.assert_close(scheduler.predict_x0(x, v, 5), want)
    assert torch.equal(scheduler.x0_at(x, v, 454), scheduler.predict_x0(x, v, 5))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_worked_out_in_float32(dtype: torch.dtype) -> None:
    scheduler = scheduler_with(15)
    x, v, x0, before, noise = (normal(seed, dtype) for seed in range(5))
    got = scheduler.update(x, x0, before, 12, noise)
    want = scheduler.update(x.float(), x0.float(), before.float(), 12, noise.float())
    assert got.dtype == dtype and torch.equal(got, want.to(dtype))
    assert torch.equal(scheduler.predict_x0(x, v, 12), scheduler.predict_x0(x.float(), v.float(), 12).to(dtype))
    assert torch.equal(scheduler.noised(x, noise), scheduler.noised(x.float(), noise.float()).to(dtype))
    assert scheduler.predict_x0(x.float(), v, 12).dtype == torch.float32


def test_generator_draws_the_noise_of_a_step() -> None:
    results = []
    for noise in (None, torch.randn(SHAPE, generator=torch.Generator().manual_seed(5))):
        generator = torch.Generator().manual_seed(5)
        scheduler = scheduler_with(4)
        results.append(scheduler.step(normal(1), 899, normal(0), generator, noise).prev_sample)
    assert torch.equal(*results)


def test_new_timesteps_forget_the_clip_before() -> None:
    scheduler, noise = STARScheduler(), normal(9)
    firsts = []
    for _ in range(2):
        scheduler.set_timesteps(4)
        firsts.append(scheduler.step(normal(1), 899, normal(0), variance_noise=noise).prev_sample)
    assert torch.equal(*firsts)


def test_a_loop_may_begin_in_the_middle_with_a_step_of_first_order() -> None:
    scheduler, x, v, noise = scheduler_with(15), normal(0), normal(1), normal(2)
    got = scheduler.step(v, 454, x, variance_noise=noise).prev_sample
    assert torch.equal(got, scheduler.update(x, scheduler.predict_x0(x, v, 5), None, 5, noise))
    assert scheduler.step_index == 6


def test_saved_settings_come_back(tmp_path, caplog) -> None:
    settings = {"mode": "trailing", "t_start": 777, "scale_min": 1.5, "scale_max": 3.0, "logsnr_max": 12.0}
    saved = STARScheduler(**settings)
    saved.save_pretrained(tmp_path)
    for loaded in (STARScheduler.from_pretrained(tmp_path), STARScheduler.from_config(saved.config)):
        assert {name: loaded.config[name] for name in settings} == settings
        assert torch.equal(loaded.sigma_t, saved.sigma_t)
        assert not torch.equal(loaded.sigma_t, STARScheduler().sigma_t)
    assert "not expected" not in caplog.text


@pytest.mark.parametrize(
    ("settings", "steps", "message"),
    [
        ({"mode": "slow"}, 15, "expected a mode of 'fast' or 'trailing'; got 'slow'"),
        ({"t_start": 500}, 15, "expected a t_start from 501 to 998 in mode 'fast'; got 500"),
        ({"t_start": 999}, 15, "from 501 to 998"),
        ({"mode": "trailing", "t_start": 0}, 15, "from 1 to 998"),
        ({}, 0, "expected at least 1 step; got 0"),
        ({"mode": "trailing"}, 900, "different timesteps"),
        ({}, 900, "different timesteps"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, object], steps: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        scheduler_with(steps, **settings)


def test_wrong_steps_are_refused() -> None:
    scheduler, x = STARScheduler(), normal(0)
    for call in (lambda: scheduler.step(x, 899, x), lambda: scheduler.predict_x0(x, x, 0)):
        with pytest.raises(ValueError, match="call set_timesteps first"):
            call()
    scheduler.set_timesteps(4)
    with pytest.raises(ValueError, match="expected one of the timesteps .*; got 898"):
        scheduler.step(x, 898, x)
    with pytest.raises(ValueError, match="expected a step from 0 to below 4; got 4"):
        scheduler.update(x, x, None, 4, x)
    with pytest.raises(ValueError, match="expected noise in step 2 of 4; got None"):
        scheduler.update(x, x, x, 2, None)
    with pytest.raises(ValueError, match="expected no x0_before in step 0"):
        scheduler.update(x, x, x, 0, x)
    for timestep in scheduler.timesteps:
        scheduler.step(x, timestep, x)
    with pytest.raises(ValueError, match="and again for another clip"):
        scheduler.step(x, 899, x)
