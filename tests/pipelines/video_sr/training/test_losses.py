"""Dynamic frequency loss and STAR's whole loss, against sums written out and finite differences."""

import math

import numpy as np
import pytest
import torch
from diffattn.pipelines.video_sr.training.losses import T_MAX, DynamicFrequencyLoss, low_pass, star_loss
from torch import Tensor

PAPER = DynamicFrequencyLoss()
RELEASED = DynamicFrequencyLoss(mode="released")
BOTH = pytest.mark.parametrize("loss", [PAPER, RELEASED], ids=["paper", "released"])
SIZES = pytest.mark.parametrize("size", [(1, 1, 1), (1, 7, 9), (3, 8, 5), (2, 6, 10)])


def clips(frames: int = 2, height: int = 6, width: int = 9, batch: int = 2, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.rand(batch, 3, frames, height, width, dtype=torch.float64, generator=generator) - 1


def slow_bands(prediction: Tensor, target: Tensor, radius: float) -> tuple[float, float]:
    """The paper's two norms of one clip, bin by bin from a sum over pixels."""
    difference = (prediction - target).numpy()
    *_, height, width = difference.shape
    rows, columns = np.arange(height), np.arange(width)
    low, high, count = 0.0, 0.0, 0
    for down in range(height):
        for along in range(width // 2 + 1):
            wave = np.exp(-2j * math.pi * (down * rows[:, None] / height + along * columns / width))
            values = (difference * wave).sum((-2, -1)) / math.sqrt(height * width)
            size = float(np.abs(values.real).sum() + np.abs(values.imag).sum())
            count += 2 * values.size
            if math.hypot(min(down, height - down) / height, along / width) <= radius / 2 + 1e-12:
                low += size
            else:
                high += size
    return low / count, high / count


@SIZES
def test_the_papers_bands_are_discs_of_the_spectrum(size: tuple[int, int, int]) -> None:
    prediction, target = clips(*size), clips(*size, seed=1)
    low, high = DynamicFrequencyLoss(cutoff=0.5).bands(prediction, target)
    for number in range(2):
        want = slow_bands(prediction[number], target[number], 0.5)
        assert (low[number].item(), high[number].item()) == pytest.approx(want, rel=1e-9, abs=1e-12)


def test_the_low_pass_is_a_disc_of_a_share_of_nyquist() -> None:
    mask = low_pass(16, 24, 0.25)
    assert mask.shape == (16, 13)
    ones = {(row if row <= 8 else row - 16, column) for row, column in mask.nonzero().tolist()}
    assert ones == {(r, c) for r in range(-8, 9) for c in range(13) if math.hypot(r / 16, c / 24) <= 0.125}
    assert low_pass(16, 24, 1.0)[0].all()
    assert not low_pass(16, 24, 1.0)[8, 12]
    assert low_pass(16, 24, 1.5).all()
    assert low_pass(16, 24, 0.0).sum() == 1, "the mean of a frame is always low"


def test_the_default_radius_is_what_a_quarter_of_the_size_can_hold() -> None:
    """A wave of 8 pixels is the finest of a video of a quarter of the size; one of 6 pixels is finer."""
    columns = torch.arange(24, dtype=torch.float64).expand(1, 3, 2, 24, 24)
    for length, band in ((8, 0), (6, 1)):
        wave = torch.cos(2 * math.pi * columns / length)
        parts = PAPER.bands(wave, torch.zeros_like(wave))
        assert parts[band].item() > 1e-3
        assert parts[1 - band].item() < 1e-12


def test_the_size_of_a_clip_does_not_weigh_in_the_papers_version() -> None:
    """White noise costs the same per bin, whatever the number of pixels."""
    totals = []
    for height, width in ((16, 24), (64, 96)):
        low, high = PAPER.bands(clips(2, height, width), clips(2, height, width, seed=1))
        totals.append((low + high).mean().item())
    assert totals[0] == pytest.approx(totals[1], rel=0.1)


@BOTH
@SIZES
def test_identical_clips_cost_nothing(loss: DynamicFrequencyLoss, size: tuple[int, int, int]) -> None:
    clip = clips(*size)
    assert loss(clip, clip.clone(), 300).item() == 0
    assert loss(clip, clip + 0.3, 300).item() > 0


@BOTH
def test_bands_add_up_to_the_spectrum(loss: DynamicFrequencyLoss) -> None:
    frames = clips(3, 7, 10)[0].transpose(0, 1)
    low, high = loss.split(frames)
    norm = "ortho" if loss.mode == "paper" else "backward"
    torch.testing.assert_close(torch.fft.irfft2(low + high, s=(7, 10), norm=norm), frames)


@BOTH
def test_low_counts_early_and_everything_less_so(loss: DynamicFrequencyLoss) -> None:
    prediction, target = clips(), clips(seed=1)
    low, high = (band.mean().item() for band in loss.bands(prediction, target))
    assert low != pytest.approx(high, rel=0.05)
    scale = 1.0 if loss.mode == "paper" else 0.01
    for timestep in (0, 1, 250, 500, 998, T_MAX):
        share = timestep / 999
        want = (1 - share) * scale * (share**2 * low + (1 - share**2) * high)
        assert loss(prediction, target, timestep).item() == pytest.approx(want, rel=1e-5)
    assert loss(prediction, target, T_MAX).item() == 0
    assert loss(prediction, target, 0).item() == pytest.approx(scale * high)
    assert loss(prediction, target, 950).item() < 0.1 * loss(prediction, target, 50).item()


def test_the_exponent_and_the_scale_are_taken() -> None:
    coarse, weight = DynamicFrequencyLoss(alpha=1.0).weights(torch.tensor([0, 333, 999]))
    torch.testing.assert_close(coarse, torch.tensor([0, 1 / 3, 1]))
    torch.testing.assert_close(weight, torch.tensor([1, 2 / 3, 0]))
    prediction, target = clips(), clips(seed=1)
    for mode, usual in (("paper", 1.0), ("released", 0.01)):
        want = DynamicFrequencyLoss(mode=mode)(prediction, target, 100).item() * 3 / usual
        assert DynamicFrequencyLoss(mode=mode, scale=3.0)(prediction, target, 100).item() == pytest.approx(want)
        assert DynamicFrequencyLoss(mode=mode, scale=0.0)(prediction, target, 100).item() == 0


@BOTH
def test_a_batch_is_the_mean_of_its_clips_each_at_its_own_timestep(loss: DynamicFrequencyLoss) -> None:
    prediction, target = clips(batch=3), clips(batch=3, seed=1)
    prediction[0] *= 0.2
    steps = [10, 500, 990]
    alone = [loss(prediction[i : i + 1], target[i : i + 1], steps[i]).item() for i in range(3)]
    got = loss(prediction, target, torch.tensor(steps))
    assert got.shape == ()
    assert got.item() == pytest.approx(sum(alone) / 3, rel=1e-6)
    assert loss(prediction, target, torch.tensor(steps[::-1])).item() != pytest.approx(got.item(), rel=0.01)


@pytest.mark.parametrize("size", [(1, 3, 4), (2, 4, 3)])
def test_the_papers_gradient_is_that_of_finite_differences(size: tuple[int, int, int]) -> None:
    prediction, target = clips(*size).requires_grad_(), clips(*size, seed=1)
    steps = torch.tensor([100, 700])
    assert torch.autograd.gradcheck(lambda clip: PAPER(clip, target, steps), (prediction,))
    (gradient,) = torch.autograd.grad(PAPER(prediction, target, steps), prediction)
    assert (gradient.abs().amax((1, 2, 3, 4)) > 1e-4).all()


def test_the_released_gradient_holds_the_masks() -> None:
    """It is that of the spectrum with the weights of the prediction as they are, and is not that of the masks."""
    prediction, target = clips(batch=1).requires_grad_(), clips(batch=1, seed=1)
    (got,) = torch.autograd.grad(RELEASED(prediction, target, 0), prediction)
    frames, wanted = prediction[0].transpose(0, 1), target[0].transpose(0, 1)
    spectrum = torch.fft.rfft2(frames)
    share = (RELEASED.split(frames)[1] / spectrum).detach()
    difference = torch.view_as_real(spectrum * share - RELEASED.split(wanted)[1])
    (want,) = torch.autograd.grad(0.01 * difference.abs().mean(), prediction)
    torch.testing.assert_close(got, want)
    assert got.abs().max() > 0


@pytest.mark.parametrize("mode", ["paper", "released"])
def test_a_step_against_the_gradient_helps(mode: str) -> None:
    loss = DynamicFrequencyLoss(mode=mode)
    prediction, target = clips().requires_grad_(), clips(seed=1)
    before = loss(prediction, target, 200)
    (gradient,) = torch.autograd.grad(before, prediction)
    assert loss(prediction - 0.1 * gradient / gradient.abs().max(), target, 200).item() < before.item()


@pytest.mark.parametrize("mode", ["paper", "released"])
def test_a_constant_has_no_gradient_and_the_same_value(mode: str) -> None:
    prediction, target = clips().requires_grad_(), clips(seed=1)
    constant = DynamicFrequencyLoss(mode=mode, differentiable=False)(prediction, target, 200)
    free = DynamicFrequencyLoss(mode=mode)(prediction, target, 200)
    assert not constant.requires_grad
    assert free.requires_grad
    assert constant.item() == free.item()
    with torch.no_grad():
        assert not DynamicFrequencyLoss(mode=mode)(prediction, target, 200).requires_grad


def test_released_low_is_what_is_weak() -> None:
    """The reverse of the paper: a bright clip's mean is "high" in the released version."""
    bright = torch.full((1, 3, 2, 8, 10), 0.7, dtype=torch.float64) + 0.01 * clips(2, 8, 10, batch=1)
    frames = bright[0].transpose(0, 1)
    for loss, strong in ((PAPER, 0), (RELEASED, 1)):
        bands = [band[..., 0, 0].abs().min().item() for band in loss.split(frames)]
        assert bands[strong] > 100 * bands[1 - strong]


def test_the_released_cutoff_is_a_quantile_or_a_multiple_of_the_mean() -> None:
    frames = 4 * clips(2, 16, 12, batch=1)[0].transpose(0, 1)
    for share in (0.5, 0.8):
        low, high = DynamicFrequencyLoss(mode="released", cutoff=share).split(frames)
        assert (low.abs() > high.abs()).double().mean().item() == pytest.approx(share, abs=0.01)
    low, high = DynamicFrequencyLoss(mode="released", balance=0.05).split(frames)
    magnitude = torch.fft.rfft2(frames).abs()
    assert torch.equal(low.abs() > high.abs(), magnitude < 1.5 * magnitude.mean())


def test_the_quantile_of_many_bins_is_that_of_a_sample_of_the_global_generator() -> None:
    frames = clips(2, 64, 64, batch=1)[0].transpose(0, 1)
    splits = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        splits.append(RELEASED.split(frames)[0])
    assert torch.equal(splits[0], splits[1])
    assert not torch.equal(splits[0], splits[2])
    whole = torch.fft.rfft2(frames).abs()
    share = (splits[0].abs() > (torch.fft.rfft2(frames) - splits[0]).abs()).double().mean().item()
    assert whole.numel() > 10_000
    assert share == pytest.approx(0.8, abs=0.02)


@BOTH
def test_few_bins_leave_the_global_generator_alone(loss: DynamicFrequencyLoss) -> None:
    before = torch.get_rng_state()
    loss(clips(2, 32, 48), clips(2, 32, 48, seed=1), 5)
    assert torch.equal(before, torch.get_rng_state())


@BOTH
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_single(loss: DynamicFrequencyLoss, dtype: torch.dtype) -> None:
    prediction, target = clips().to(dtype).requires_grad_(), clips(seed=1).to(dtype)
    got = loss(prediction, target, 100)
    got.backward()
    assert got.dtype == torch.float32
    assert got.item() == pytest.approx(loss(prediction.double(), target.double(), 100).item(), rel=1e-5)
    assert prediction.grad is not None
    assert prediction.grad.dtype == dtype
    assert prediction.grad.isfinite().all()
    assert prediction.grad.abs().max() > 0


def test_the_whole_loss_is_the_velocity_and_the_term() -> None:
    prediction, target = clips().requires_grad_(), clips(seed=1)
    velocity = torch.randn(2, 4, 2, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    velocity.requires_grad_()
    got = star_loss(velocity, torch.ones_like(velocity), prediction, target, torch.tensor([5, 600]), PAPER)
    assert got.velocity.item() == pytest.approx(((velocity.detach().numpy() - 1) ** 2).mean())
    assert got.frequency.item() == PAPER(prediction, target, torch.tensor([5, 600])).item()
    assert got.total.item() == pytest.approx(got.velocity.item() + got.frequency.item())
    got.total.backward()
    for leaf in (velocity, prediction):
        assert leaf.grad is not None
        assert leaf.grad.abs().max() > 0
    half = star_loss(velocity.half(), torch.ones_like(velocity).half(), prediction, target, 5, PAPER)
    assert half.velocity.dtype == torch.float32
    assert half.velocity.item() == pytest.approx(got.velocity.item(), rel=1e-2)


@BOTH
@pytest.mark.parametrize(
    ("prediction", "target", "timestep", "message"),
    [
        (clips(), clips(batch=1), 0, r"got \(2, 3, 2, 6, 9\) and \(1, 3, 2, 6, 9\)"),
        (clips()[0], clips()[0], 0, "expected prediction and target as"),
        (clips().transpose(1, 2), clips().transpose(1, 2), 0, "channels second"),
        (clips()[:, :, :0], clips()[:, :, :0], 0, "not empty"),
        (clips().byte(), clips().byte(), 0, "expected floats in -1..1; got torch.uint8"),
        (clips(), clips(), -1, r"expected timesteps in 0..999, one or 2; got -1"),
        (clips(), clips(), 1000, "got 1000"),
        (clips(), clips(), math.nan, "got nan"),
        (clips(), clips(), torch.tensor([0, 1, 2]), r"one or 2; got \[0, 1, 2\]"),
        (clips(), clips(), torch.zeros(2, 1), "give each clip its own"),
    ],
)
def test_wrong_clips_and_timesteps_are_refused(
    loss: DynamicFrequencyLoss, prediction: Tensor, target: Tensor, timestep: Tensor | int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        loss(prediction, target, timestep)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "official"}, "expected mode 'paper' or 'released'; got 'official'"),
        ({"alpha": 0.0}, "expected alpha > 0"),
        ({"scale": -1.0}, "scale >= 0"),
        ({"cutoff": -0.1}, "expected cutoff in 0..inf for mode 'paper'"),
        ({"mode": "released", "cutoff": 1.1}, "expected cutoff in 0..1.0 for mode 'released'"),
        ({"balance": 0.1}, "expected balance in mode 'released' without cutoff; got mode 'paper'"),
        ({"mode": "released", "balance": 0.1, "cutoff": 0.5}, "leave one out"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DynamicFrequencyLoss(**options)


def test_wrong_velocities_are_refused() -> None:
    good = torch.zeros(2, 4, 2, 3, 5)
    for one, other in ((good, good[:, :1]), (good[:1], good[:1]), (good[:, :0], good[:, :0])):
        with pytest.raises(ValueError, match="expected velocities of one shape, and of the batch of the clips, 2"):
            star_loss(one, other, clips(), clips(), 0, PAPER)
