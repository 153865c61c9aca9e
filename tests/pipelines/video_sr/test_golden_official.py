"""Schedule, sampler, chunks, padding and colours against the numbers recorded from the released code."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from diffattn.pipelines.video_sr.clips.chunks import kept, official_chunks, plan_windows
from diffattn.pipelines.video_sr.i2vgenxl.guidance import guide
from diffattn.pipelines.video_sr.i2vgenxl.padding import official_padding, official_target
from diffattn.pipelines.video_sr.i2vgenxl.scheduler import FAST_STEPS, STARScheduler
from golden_record import Record
from golden_star import star_cases
from golden_vectors import GoldenCase, assert_golden, of_float32, run_golden, with_a_key_more, write_case
from torch import Tensor

from diffattn.media.color import adain_fix, to_bytes, wavelet_fix, wavelet_split

Tensors = dict[str, Tensor]

MODES = {"fast": "fast", "normal": "trailing"}
STUB = "v = A0*xt + A1*hint + A2*mean(y)*(1+t/1000) + A3*tanh(mean over frames of xt)"
RULES = {"chunks", "pad_to_fit", "adjust_resolution"}


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
    settings = case.spec["schedule"].plain()
    assert settings.pop("name") == "logsnr_cosine_interp" and settings.pop("zero_terminal_snr") is True
    settings["num_train_timesteps"] = settings.pop("n")
    tensors, tolerance = case.tensors(), of_float32(case.tolerance)
    table = STARScheduler(**settings)
    assert_golden("sigmas", table.sigma_t, tensors["sigmas"], tolerance)
    assert_golden("alphas", table.alpha_t, tensors["alphas"], tolerance)
    info = case.spec.get("info", Record({}))
    for name in sorted(set(info) | {key.split("/")[0] for key in tensors if "/" in key}):
        scheduler = scheduler_of(name, settings)
        if name in info:
            assert len(scheduler.timesteps) == info[name]["nfe"], name
        if f"{name}/ksigmas" in tensors:
            assert_golden(f"{name}/ksigmas", scheduler.sigmas, tensors[f"{name}/ksigmas"], tolerance)
        if f"{name}/model_t" in tensors:
            assert scheduler.timesteps.tolist() == tensors[f"{name}/model_t"].tolist(), name


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
        check_clip(one, tensors.under(f"{number}/"), case)


def check_clip(one: Record, own: Tensors, case: GoldenCase) -> None:
    scheduler = STARScheduler(mode=MODES[one["mode"]], t_start=one["t_aug"])
    scheduler.set_timesteps(steps_of(one["mode"], one["steps"]))
    assert own["lq_latent"].shape[2] == one["frames"]
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
    windows: list[Any], scheduler: STARScheduler, x: Tensor, step: int, one: Record, own: Tensors
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
    spec = case.spec
    for one in spec.get("chunks", []):
        check_chunks(one)
    for one in spec.get("pad_to_fit", []):
        rows, columns = one["h"], one["w"]
        padding = official_padding(rows, columns)
        assert [padding.left, padding.right, padding.top, padding.bottom] == one["pad_w1_w2_h1_h2"], (rows, columns)
        padded = [rows + padding.top + padding.bottom, columns + padding.left + padding.right]
        assert padded == one["padded"], (rows, columns)
    for one in spec.get("adjust_resolution", []):
        assert list(official_target(one["h"], one["w"], one["up"])) == one["target"], one["target"]


def check_chunks(one: Record) -> None:
    frames, most, error = one["frames"], one["max_chunk_len"], one["error"]
    where = (frames, most)
    chunks = official_chunks(frames, most)
    assert [list(chunk) for chunk in chunks] == (one["chunk_inds"] or [[0, frames]]), where
    # The released sampler fails with a single chunk; here that is the whole clip.
    parts = [[0, frames]] if one["keep"] is None else one["keep"]
    assert one["keep"] is not None or len(chunks) == 1, where
    assert error is None or len(chunks) == 1, where
    assert [list(part) for part in kept(chunks)] == parts, where
    owned = [
        [w.begin + place for place in w.weights.nonzero().flatten().tolist()]
        for w in plan_windows(frames, most, 0, official=True)
    ]
    assert owned == [list(range(*part)) for part in parts], where


def check_pictures(case: GoldenCase) -> None:
    """Groups `<name>/..`: clips whose colours are mended, and what comes of it; or bytes of a clip, x and y."""
    tensors = case.tensors()
    for group in sorted({key.split("/")[0] for key in tensors}):
        own = tensors.under(f"{group}/")
        if own.keys() == {"x", "y"}:
            check_bytes(own["x"], own["y"], case)
        else:
            check_colours(group, own, case)


BANDS = ("wavelet_high", "wavelet_low")
FIXES = {"adain": adain_fix, "wavelet": wavelet_fix}


def check_colours(group: str, own: Tensors, case: GoldenCase) -> None:
    """Fixes are of a target clip by a source; bands of the target, or else of the only clip that there is."""
    results = {name: own.pop(name) for name in list(own) if name in (*BANDS, *FIXES)}
    assert results and 1 <= len(own) <= 2, f"expected one or two clips and a result in group {group}; got {sorted(own)}"
    clips = {name: Clip.of(name, clip) for name, clip in own.items()}
    target = next((clips[name] for name in clips if name.startswith(("target", "content"))), None)
    source = next((clips[name] for name in clips if name.startswith(("source", "style"))), None)
    if len(clips) == 1:
        target = source or target or next(iter(clips.values()))
    assert target is not None, f"clips that no test knows: {sorted(own)}"
    for name, want in results.items():
        if name in BANDS:
            got = wavelet_split(target.pictures)[BANDS.index(name)]
        else:
            assert source is not None, f"{group}/{name}: colours of a clip that was not recorded"
            got = target.like(FIXES[name](target.pictures, source.pictures).clamp(0, 1))
        assert_golden(f"{group}/{name}", got, want, case.tolerance)


@dataclass
class Clip:
    """Images (frames, 3, rows, columns) in 0..1, and the form that they were recorded in."""

    pictures: Tensor
    channels_last: bool
    low: float
    high: float

    @classmethod
    def of(cls, name: str, clip: Tensor) -> "Clip":
        """By the end of the name, such as "_thwc_0_255"; a name that says nothing leaves it to the numbers."""
        told = re.search(r"_(thwc|tchw)_(0_255|m1_1|0_1)$", name)
        last = told[1] == "thwc" if told else clip.shape[1] != 3
        guessed = "m1_1" if clip.min() < 0 else "0_1" if clip.max() <= 1 else "0_255"
        low, high = {"0_255": (0.0, 255.0), "m1_1": (-1.0, 1.0), "0_1": (0.0, 1.0)}[told[2] if told else guessed]
        return cls(((clip.movedim(-1, 1) if last else clip) - low) / (high - low), last, low, high)

    def like(self, pictures: Tensor) -> Tensor:
        """Images in 0..1 in the form of this clip."""
        return (pictures.movedim(1, -1) if self.channels_last else pictures) * (self.high - self.low) + self.low


def check_bytes(x: Tensor, y: Tensor, case: GoldenCase) -> None:
    """The released code leaves fractions of bytes, which its writer cuts off."""
    pictures = ((x + 1) / 2)[0].movedim(0, 1)
    assert_golden("tensor2vid/y", pictures.clamp(0, 1).movedim(1, -1) * 255, y, case.tolerance)
    got, slack = to_bytes(pictures).movedim(1, -1), 1e-3
    assert ((got >= (y - slack).floor()) & (got <= (y + slack).floor())).all()


# ---- cases of our own


def test_a_key_that_is_not_used_fails(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"\['chunks.0.surprise'\]"):
        run_golden(test_official, with_a_key_more("star", "chunks_padding", tmp_path, "chunks", 0))


def test_a_clip_without_a_target(tmp_path: Path) -> None:
    """Bands of the only clip that there is, of whatever name, which sum to it."""
    clip = torch.rand(2, 3, 9, 14) * 2 - 1
    high, low = wavelet_split((clip.double() + 1) / 2)
    for name in ("source_tchw_m1_1", "x"):
        tensors = {f"0/{name}": clip, "0/wavelet_high": high.float(), "0/wavelet_low": low.float()}
        case = write_case(tmp_path / "star", f"color_{name}", {}, tensors)
        run_golden(test_official, case)
    tensors = {"0/source_tchw_m1_1": clip, "0/adain": clip.clone()}
    run_golden(
        test_official, write_case(tmp_path / "star", "color_self", {"tolerance": {"atol": 1e-4, "rtol": 0}}, tensors)
    )
    with pytest.raises(AssertionError, match="expected one or two clips and a result in group 0"):
        test_official(write_case(tmp_path / "star", "color_none", {}, {"0/source_tchw_m1_1": clip}))
