"""Schedule, sampler, chunks, padding and colours against the numbers recorded from the released code."""

import re
from typing import Any

import pytest
import torch
from diffattn.pipelines.video_sr.chunks import kept, official_chunks, plan_windows
from diffattn.pipelines.video_sr.guidance import guide
from diffattn.pipelines.video_sr.padding import official_padding, official_target
from diffattn.pipelines.video_sr.scheduler import FAST_STEPS, STARScheduler
from golden_star import star_cases
from golden_vectors import GoldenCase, assert_golden
from torch import Tensor

from diffattn.color import adain_fix, to_bytes, wavelet_fix, wavelet_split

Tensors = dict[str, Tensor]

MODES = {"fast": "fast", "normal": "trailing"}
STUB = "v = A0*xt + A1*hint + A2*mean(y)*(1+t/1000) + A3*tanh(mean over frames of xt)"
RULES = {"chunks", "pad_to_fit", "adjust_resolution"}
BOOKKEEPING = {"what", "files", "source", "commit", "torch", "tensors", "tolerance", "config", "notes"}


@pytest.mark.golden
@pytest.mark.parametrize("case", star_cases("official"))
def test_official(case: GoldenCase) -> None:
    if "schedule" in case.spec:
        check_schedules(case)
    elif "cases" in case.spec:
        check_sampler(case)
    elif RULES & set(case.spec):
        check_rules(case)
    else:
        check_pictures(case)


def check_schedules(case: GoldenCase) -> None:
    settings = dict(case.spec["schedule"])
    assert settings.pop("name") == "logsnr_cosine_interp" and settings.pop("zero_terminal_snr") is True
    settings["num_train_timesteps"] = settings.pop("n")
    tensors = case.tensors()
    table = STARScheduler(**settings)
    assert_golden("sigmas", table.sigma_t, tensors.pop("sigmas"), case.tolerance)
    assert_golden("alphas", table.alpha_t, tensors.pop("alphas"), case.tolerance)
    names = set(case.spec.get("info", {})) | {key.split("/")[0] for key in tensors}
    for name in sorted(names):
        scheduler = scheduler_of(name, settings)
        if name in case.spec.get("info", {}):
            assert len(scheduler.timesteps) == case.spec["info"][name]["nfe"], name
        if f"{name}/ksigmas" in tensors:
            assert_golden(f"{name}/ksigmas", scheduler.sigmas, tensors.pop(f"{name}/ksigmas"), case.tolerance)
        if f"{name}/model_t" in tensors:
            assert scheduler.timesteps.tolist() == tensors.pop(f"{name}/model_t").tolist(), name
    assert not tensors, f"tensors that no test knows: {sorted(tensors)}"


def scheduler_of(name: str, settings: dict[str, Any]) -> STARScheduler:
    """Scheduler of a name like "normal30", with its timesteps set."""
    mode, steps = re.fullmatch(r"([a-z]+)(\d+)", name).groups()
    scheduler = STARScheduler(**settings, mode=MODES[mode])
    scheduler.set_timesteps(steps_of(mode, int(steps)))
    return scheduler


def steps_of(mode: str, steps: int) -> int:
    """The number of steps that makes what the released code makes: its fast mode doesn't look at the number."""
    return FAST_STEPS if mode == "fast" else steps


def check_sampler(case: GoldenCase) -> None:
    tensors = case.tensors()
    for number, one in enumerate(case.spec["cases"]):
        assert one["stub"] == STUB, f"a network that no test knows: {one['stub']}"
        own = {key.split("/", 1)[1]: tensors.pop(key) for key in list(tensors) if key.startswith(f"{number}/")}
        check_clip(one, own, case)
    assert not tensors, f"tensors that no test knows: {sorted(tensors)}"


def check_clip(one: dict[str, Any], own: Tensors, case: GoldenCase) -> None:
    scheduler = STARScheduler(mode=MODES[one["mode"]], t_start=one["t_aug"])
    scheduler.set_timesteps(steps_of(one["mode"], one["steps"]))
    noised = scheduler.noised(own["lq_latent"], own["aug_noise"])
    assert_golden("noised_lr", noised, own["noised_lr"], case.tolerance)
    sigmas = torch.stack([scheduler.sigmas[:-2], scheduler.sigmas[1:-1]], dim=1)
    assert_golden("step_sigma", sigmas, own["step_sigma"], case.tolerance)
    windows = plan_windows(one["frames"], one["max_chunk_len"], 0, official=True)
    assert [[w.begin, w.end] for w in windows] == (one["chunk_inds"] or [[0, one["frames"]]])
    stateless = x = scheduler.start(noised)
    before = None
    for step, timestep in enumerate(scheduler.timesteps.tolist()):
        noise = own["step_noise"][step] if step < len(own["step_noise"]) else None
        x0 = sum_of_windows(windows, scheduler, stateless, step, one, own)
        # step() takes v of the whole clip: the one that has this x0.
        alpha, sigma = float(scheduler.alpha_t[timestep]), float(scheduler.sigma_t[timestep])
        x = scheduler.step((alpha * x - x0) / sigma, timestep, x, variance_noise=noise).prev_sample
        stateless, before = scheduler.update(stateless, x0, before, step, noise), x0
    assert_golden("out", stateless, own["out"], case.tolerance)
    assert_golden("out by step()", x, own["out"], case.tolerance)


def sum_of_windows(
    windows: list[Any], scheduler: STARScheduler, x: Tensor, step: int, one: dict[str, Any], own: Tensors
) -> Tensor:
    total = torch.zeros_like(x)
    for window in windows:
        frames = slice(window.begin, window.end)
        seen, hint = x[:, :, frames], own["lq_latent"][:, :, frames]
        timestep = int(scheduler.timesteps[step])
        model_input = scheduler.model_input(seen, step)
        cond, uncond = (stub(model_input, hint, own[text], timestep, one["A"]) for text in ("y", "y_neg"))
        v = guide(cond, uncond, one["guide_scale"], one["guide_rescale"] or 0.0)
        total[:, :, frames] += scheduler.predict_x0(seen, v, step) * window.weights.float()[:, None, None]
    return total


def stub(x: Tensor, hint: Tensor, text: Tensor, timestep: int, factors: list[float]) -> Tensor:
    a, b, c, d = factors
    return a * x + b * hint + c * text.mean() * (1 + timestep / 1000) + d * torch.tanh(x.mean(2, keepdim=True))


def check_rules(case: GoldenCase) -> None:
    assert set(case.spec) - BOOKKEEPING <= RULES and not case.spec.get("tensors")
    for one in case.spec.get("chunks", []):
        check_chunks(one)
    for one in case.spec.get("pad_to_fit", []):
        padding = official_padding(one["h"], one["w"])
        assert [padding.left, padding.right, padding.top, padding.bottom] == one["pad_w1_w2_h1_h2"], one
        rows, columns = one["h"] + padding.top + padding.bottom, one["w"] + padding.left + padding.right
        assert [rows, columns] == one["padded"], one
    for one in case.spec.get("adjust_resolution", []):
        assert list(official_target(one["h"], one["w"], one["up"])) == one["target"], one


def check_chunks(one: dict[str, Any]) -> None:
    frames = one["frames"]
    chunks = official_chunks(frames, one["max_chunk_len"])
    assert [list(chunk) for chunk in chunks] == (one["chunk_inds"] or [[0, frames]]), one
    # The released sampler fails with a single chunk; here that is the whole clip.
    parts = [[0, frames]] if one["keep"] is None else one["keep"]
    assert one["keep"] is not None or len(chunks) == 1, one
    assert [list(part) for part in kept(chunks)] == parts, one
    owned = [
        [w.begin + place for place in w.weights.nonzero().flatten().tolist()]
        for w in plan_windows(frames, one["max_chunk_len"], 0, official=True)
    ]
    assert owned == [list(range(*part)) for part in parts], one


def check_pictures(case: GoldenCase) -> None:
    tensors = case.tensors()
    if "tensor2vid/x" in tensors:
        check_bytes(tensors.pop("tensor2vid/x"), tensors.pop("tensor2vid/y"), case)
    for number in sorted({key.split("/")[0] for key in tensors}):
        own = {key.split("/", 1)[1]: tensors.pop(key) for key in list(tensors) if key.startswith(f"{number}/")}
        content = own.pop("target_thwc_0_255").movedim(-1, 1) / 255
        style = (own.pop("source_tchw_m1_1") + 1) / 2
        assert own, f"no result for pictures {number}"
        for name, want in own.items():
            assert_golden(f"{number}/{name}", recoloured(name, content, style), want, case.tolerance)
    assert not tensors, f"tensors that no test knows: {sorted(tensors)}"


def recoloured(name: str, content: Tensor, style: Tensor) -> Tensor:
    if name in ("wavelet_high", "wavelet_low"):
        return wavelet_split(content)[name == "wavelet_low"]
    fixes = {"adain": adain_fix, "wavelet": wavelet_fix}
    assert name in fixes, f"a fix of colours that no test knows: {name}"
    return fixes[name](content, style).clamp(0, 1).movedim(1, -1) * 255


def check_bytes(x: Tensor, y: Tensor, case: GoldenCase) -> None:
    """The released code leaves fractions of bytes, which its writer cuts off."""
    pictures = ((x + 1) / 2)[0].movedim(0, 1)
    assert_golden("tensor2vid/y", pictures.clamp(0, 1).movedim(1, -1) * 255, y, case.tolerance)
    got, slack = to_bytes(pictures).movedim(1, -1), 1e-3
    assert ((got >= (y - slack).floor()) & (got <= (y + slack).floor())).all()
