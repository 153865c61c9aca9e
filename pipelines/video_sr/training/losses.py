"""STAR's training loss: the velocity's, and the dynamic frequency loss of the decoded clip.

    L        = mean (v - v_target)^2 + L_f
    L_f      = b(t) * scale * [c(t) * L_low + (1 - c(t)) * L_high]
    b(t)     = 1 - t / t_max,    c(t) = (t / t_max)^alpha,    t_max = 999
    L_band   = mean |band(F) - band(F_target)| over real and imaginary parts,    F = rfft2 of every frame

At high noise only coarse structure can be right, so c leans to low frequencies; b takes the whole term away where the
prediction is worth little. Two versions of the bands, with a = |F|:

    paper       low = F where the frequency is at most `cutoff` of Nyquist, high = the rest.
    released    low = F * m, high = F * (1 - m),  m = sigmoid(10 * (q - a)),  q = quantile of a at `cutoff`.

The released code's m picks weak bins, so its "low" is mostly fine detail and its "high" structure: the reverse of the
paper. It also decoded the prediction without gradients, so the term taught nothing (`differentiable=False`).

The paper leaves open: the low-pass and its radius; here an ideal disc of 1/4 of Nyquist, all that a video of a quarter
of the size holds; the norm; here the mean absolute difference, as released; the transform's scale; here orthonormal,
so that a weight of 1 means the same for clips of any size (released: not normalised).

Source: Xie et al., STAR, 2025, https://arxiv.org/abs/2501.02976, the dynamic frequency loss; alpha and b by its
ablation.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

T_MAX = 999
"""Highest timestep."""

SAMPLED = 10_000
"""Most magnitudes that a quantile is taken of; of more, as many are drawn with replacement."""

STEEPNESS = 10.0
"""Slope of the released mask per unit of magnitude."""

Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True, kw_only=True)
class DynamicFrequencyLoss:
    """Difference of spectra, weighted by timestep; see the module for both versions.

    In "released" the masks are held constant: gradients pass through the spectrum alone. Above 10,000 bins per clip
    its quantile is that of 10,000 drawn from torch's global CPU generator, first for the prediction, then for the
    target of each sample.

    Raises:
        ValueError: an unknown mode, a number out of its range, or a balance in the paper's mode.
    """

    mode: Literal["paper", "released"] = "paper"
    alpha: float = 2.0
    """Exponent of c; positive."""
    scale: float | None = None
    """Weight of the term; None for 1 in "paper" and 0.01 in "released"."""
    cutoff: float | None = None
    """"paper": radius of the low-pass, 1 for Nyquist along an axis, above sqrt(2) for everything; None for 1/4.
    "released": share of the bins, 0..1, below the middle of the mask; None for 0.8."""
    balance: float | None = None
    """"released": takes q = mean(a) * (1 + 10 * balance) instead of the quantile."""
    differentiable: bool = True
    """False: a constant, as the released training had it."""

    def __post_init__(self) -> None:
        if self.mode not in ("paper", "released"):
            raise ValueError(f"expected mode 'paper' or 'released'; got {self.mode!r}; pick one")
        if not self.alpha > 0 or (self.scale is not None and not self.scale >= 0):
            raise ValueError(f"expected alpha > 0 and scale >= 0; got {self.alpha} and {self.scale}; change them")
        most = 1.0 if self.mode == "released" else float("inf")
        if self.cutoff is not None and not 0 <= self.cutoff <= most:
            raise ValueError(f"expected cutoff in 0..{most} for mode {self.mode!r}; got {self.cutoff}; change it")
        if self.balance is not None and (self.mode == "paper" or self.cutoff is not None):
            raise ValueError(
                f"expected balance in mode 'released' without cutoff; got mode {self.mode!r} and cutoff "
                f"{self.cutoff}; leave one out"
            )

    def __call__(self, prediction: Tensor, target: Tensor, timestep: Tensor | int) -> Tensor:
        """The term for a batch, a scalar: the mean over samples, each by its own timestep and its own cutoff.

        Half precision is computed in float32.

        Args:
            prediction: decoded clean clips, RGB in -1..1, (batch, 3, frames, height, width).
            target: ground truth of the same shape.
            timestep: in 0..999; (batch,), or one for all.

        Raises:
            ValueError: another shape, an empty one, or timesteps out of range.
        """
        _check_clips(prediction, target)
        coarse, weight = self.weights(_timesteps(timestep, prediction))
        low, high = self.bands(prediction, target)
        return (weight * self._scale * (coarse * low + (1 - coarse) * high)).mean()

    def weights(self, timestep: Tensor) -> Pair:
        """c(t) and b(t), of the shape of `timestep`."""
        share = timestep.float() / T_MAX
        return share**self.alpha, 1 - share

    def bands(self, prediction: Tensor, target: Tensor) -> Pair:
        """L_low and L_high, (batch,) each, of clips as in `__call__`."""
        _check_clips(prediction, target)
        with torch.set_grad_enabled(self.differentiable and torch.is_grad_enabled()):
            pairs = zip(prediction.transpose(1, 2), target.transpose(1, 2), strict=True)
            low, high = zip(*(self._bands_of_one(*pair) for pair in pairs), strict=True)
            return torch.stack(low), torch.stack(high)

    def split(self, frames: Tensor) -> Pair:
        """Low and high band of frames (frames, 3, height, width) as complex rfft2; they add up to the spectrum."""
        frames = _single(frames)
        if self.mode == "paper":
            spectrum = torch.fft.rfft2(frames, norm="ortho")
            height, width = frames.shape[-2:]
            low = low_pass(height, width, 0.25 if self.cutoff is None else self.cutoff).to(frames)
        else:
            spectrum = torch.fft.rfft2(frames)
            low = self._weak(spectrum.detach().abs())
        return spectrum * low, spectrum * (1 - low)

    @property
    def _scale(self) -> float:
        if self.scale is not None:
            return self.scale
        return 1.0 if self.mode == "paper" else 0.01

    def _bands_of_one(self, prediction: Tensor, target: Tensor) -> Pair:
        got, want = self.split(prediction), self.split(target)
        low, high = (_distance(*pair) for pair in zip(got, want, strict=True))
        return low, high

    def _weak(self, magnitude: Tensor) -> Tensor:
        """The released mask: near 1 for bins weaker than the cutoff."""
        if self.balance is not None:
            middle = magnitude.mean() * (1 + 10 * self.balance)
        else:
            middle = _quantile(magnitude.flatten(), 0.8 if self.cutoff is None else self.cutoff)
        return torch.sigmoid(STEEPNESS * (middle - magnitude))


class StarLoss(NamedTuple):
    """`total` to step on, and its parts to log; scalars."""

    total: Tensor
    velocity: Tensor
    frequency: Tensor


def star_loss(
    velocity: Tensor,
    velocity_target: Tensor,
    prediction: Tensor,
    target: Tensor,
    timestep: Tensor | int,
    frequency_loss: DynamicFrequencyLoss,
) -> StarLoss:
    """Mean squared difference of the velocities, in float32 at least, plus the dynamic frequency loss.

    Args:
        velocity: the network's output, v = alpha * noise - sigma * x0, (batch, channels, frames, rows, columns).
        velocity_target: of the same shape.
        prediction: the clean clip that `velocity` stands for, x0 = alpha * x_t - sigma * v, decoded; see
            `DynamicFrequencyLoss.__call__`, as for `target` and `timestep`.

    Raises:
        ValueError: shapes or batches that differ, or what `DynamicFrequencyLoss.__call__` refuses.
    """
    if velocity.shape != velocity_target.shape or 0 in velocity.shape or len(velocity) != len(prediction):
        raise ValueError(
            f"expected velocities of one shape, and of the batch of the clips, {len(prediction)}; got "
            f"{tuple(velocity.shape)} and {tuple(velocity_target.shape)}; pair them one to one"
        )
    frequency = frequency_loss(prediction, target, timestep)
    distance = F.mse_loss(_single(velocity), _single(velocity_target))
    return StarLoss(distance + frequency, distance, frequency)


def low_pass(height: int, width: int, cutoff: float) -> Tensor:
    """1 where the frequency of a bin of rfft2 is at most `cutoff` of Nyquist, else 0; (height, width // 2 + 1)."""
    rows = torch.fft.fftfreq(height, dtype=torch.float64)[:, None]
    columns = torch.fft.rfftfreq(width, dtype=torch.float64)
    return (torch.hypot(rows, columns) <= cutoff / 2).float()


def _quantile(values: Tensor, share: float) -> Tensor:
    if len(values) > SAMPLED:
        values = values[torch.randint(0, len(values), (SAMPLED,)).to(values.device)]
    return torch.quantile(values, share)


def _distance(one: Tensor, other: Tensor) -> Tensor:
    return F.l1_loss(torch.view_as_real(one), torch.view_as_real(other))


def _single(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _timesteps(timestep: Tensor | int, clips: Tensor) -> Tensor:
    """One for each clip, beside it."""
    steps = torch.as_tensor(timestep, device=clips.device)
    if steps.shape not in ((), (len(clips),)) or not bool(((steps >= 0) & (steps <= T_MAX)).all()):
        raise ValueError(
            f"expected timesteps in 0..{T_MAX}, one or {len(clips)}; got {steps.tolist()}; give each clip its own"
        )
    return steps.expand(len(clips))


def _check_clips(prediction: Tensor, target: Tensor) -> None:
    shape = prediction.shape
    if shape != target.shape or len(shape) != 5 or shape[1] != 3 or 0 in shape:
        raise ValueError(
            "expected prediction and target as (batch, 3, frames, height, width), not empty; got "
            f"{tuple(shape)} and {tuple(target.shape)}; decode latents first, and put the channels second"
        )
    if not (prediction.is_floating_point() and target.is_floating_point()):
        raise ValueError(f"expected floats in -1..1; got {prediction.dtype} and {target.dtype}; scale bytes first")
