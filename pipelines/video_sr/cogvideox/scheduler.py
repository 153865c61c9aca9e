"""Sampler of STAR's CogVideoX variant: second-order multistep DPM-Solver++ of the SDE, without signal at the start.

    a_k  = (b_k - b_0) b_last / (b_last - b_0),    s_k^2 = 1 - a_k^2
    x0_k = a'_k x_k - sqrt(1 - a'_k^2) v_k
    D_k  = x0_k + (h_k / 2 h_{k-1}) (x0_k - x0_{k-1})
    x_{k+1} = (s_{k+1} / s_k) e^{-h_k} x_k + (1 - e^{-2 h_k}) a_{k+1} D_k + s_{k+1} sqrt(1 - e^{-2 h_k}) noise

b is sqrt(abar) at the timesteps in use, h_k = log(a_{k+1} / s_{k+1}) - log(a_k / s_k). Steps are counted from noise,
k = 0 with a_0 = 0, to the clip. In the first step and the one after it D is x0, for h_0 is infinite; the last step
gives x0. As released, the rescaling to zero terminal SNR uses the timesteps in use, where diffusers' uses all of
training: up to 6e-4 apart at 50 steps. The network's estimate is read with a', the nearest to a among the values of all
timesteps of training.

Sources: Lu et al., DPM-Solver++, 2022, https://arxiv.org/abs/2211.01095, Alg. 2 in its SDE form; Lin et al., Common
Diffusion Noise Schedules and Sample Steps are Flawed, 2023, https://arxiv.org/abs/2305.08891, Alg. 1; the guidance:
Yang et al., CogVideoX, 2024, https://arxiv.org/abs/2408.06072, as released.
"""

import math

import numpy as np
import torch
from diffusers import CogVideoXDPMScheduler
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

# diffusers looks for the class that knows how to load a component in the component's own module.
__all__ = ["STARCogVideoXScheduler", "SchedulerMixin"]


class STARCogVideoXScheduler(SchedulerMixin, ConfigMixin):  # type: ignore[misc]
    """The sampler as a scheduler of diffusers, and as functions without state.

    `step` keeps the last estimate of the clip for the next step. `predict_x0` and `update` keep nothing and work on
    each element alone, so they may be given any block of a clip. Everything is computed in float32 or wider.

    Args:
        num_train_timesteps: of training.
        beta_start: of the scaled linear schedule; so is `beta_end`.
        beta_end: see `beta_start`.
        snr_shift_scale: by which the signal-to-noise ratio is divided; 1 for the 5B model.
    """

    order = 1
    init_noise_sigma = 1.0

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.00085,
        beta_end: float = 0.012,
        snr_shift_scale: float = 1.0,
    ) -> None:
        plain, zero_snr = (
            CogVideoXDPMScheduler(
                num_train_timesteps,
                beta_start,
                beta_end,
                "scaled_linear",
                snr_shift_scale=snr_shift_scale,
                rescale_betas_zero_snr=rescaled,
            ).alphas_cumprod
            for rescaled in (False, True)
        )
        self._alphas_cumprod: Tensor = plain
        self.alphas_cumprod: Tensor = zero_snr
        """abar of all timesteps of training, rescaled to zero terminal SNR."""
        self.timesteps = torch.arange(num_train_timesteps - 1, -1, -1)
        self.signal: list[float] = []
        """a of every step."""
        self.estimated: list[float] = []
        """a' of every step."""
        self._last: tuple[int, Tensor] | None = None

    def set_timesteps(self, num_inference_steps: int, device: torch.device | str | None = None) -> None:
        """Steps at t_k = floor((T - 1)(1 - k / n)): 999, 979, .. 19 for n = 50."""
        trained = self.config.num_train_timesteps
        if not 1 <= num_inference_steps <= trained:
            raise ValueError(f"expected from 1 to {trained} steps; got {num_inference_steps}; 50 are usual")
        steps = np.linspace(trained - 1, 0, num_inference_steps, endpoint=False).astype(int)
        self.timesteps = torch.from_numpy(steps).to(device)
        b = self._alphas_cumprod.sqrt()
        used, table = _rescaled(b[steps]), _rescaled(b.flip(0))
        self.signal = used.tolist()
        self.estimated = table[(table - used[:, None]).abs().argmin(1)].tolist()
        self._last = None

    def scale_model_input(self, sample: Tensor, timestep: int | Tensor | None = None) -> Tensor:
        """The sample itself: the model was trained on x_t."""
        return sample

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        generator: torch.Generator | None = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> DDIMSchedulerOutput | tuple[Tensor, Tensor]:
        """One step; the next sample, and the clip as estimated in this one.

        Args:
            model_output: velocity.
            timestep: one of `timesteps`; called out of order, or in the middle first, the step is of first order.
            sample: x_t.
            generator: of the noise, drawn once in every step but the last.
            variance_noise: take this noise instead of drawing it.
        """
        step = self.step_of(timestep)
        last = step == len(self.signal) - 1
        if variance_noise is None and not last:
            variance_noise = randn_tensor(
                model_output.shape, generator=generator, device=sample.device, dtype=sample.dtype
            )
        x0 = self.predict_x0(sample, model_output, step)
        before = self._last[1] if self._last is not None and self._last[0] == step - 1 else None
        following = self.update(sample, x0, before, step, None if last else variance_noise)
        self._last = None if last else (step, x0)
        return DDIMSchedulerOutput(following, x0) if return_dict else (following, x0)

    def step_of(self, timestep: int | Tensor) -> int:
        """Number of the step at a timestep."""
        if not self.signal:
            raise ValueError("expected set_timesteps before the first step; call it")
        found = [step for step, own in enumerate(self.timesteps.tolist()) if own == int(timestep)]
        if not found:
            raise ValueError(f"expected one of the timesteps in use; got {int(timestep)}; they are {self.timesteps}")
        return found[0]

    def predict_x0(self, x: Tensor, v: Tensor, step: int) -> Tensor:
        """x0 = a' x - sqrt(1 - a'^2) v, in float32 or wider."""
        a = self.estimated[step]
        return a * _wide(x) - math.sqrt(1 - a * a) * _wide(v)

    def update(self, x: Tensor, x0: Tensor, x0_before: Tensor | None, step: int, noise: Tensor | None) -> Tensor:
        """x of the next step, in the dtype of `x`.

        Args:
            x: of this step.
            x0: estimated in this step.
            x0_before: estimated in the step before. None: a step of first order.
            step: counted from 0, the noisiest.
            noise: unit normal; None in the last step, which gives `x0`, and only there.
        """
        last = step == len(self.signal) - 1
        if (noise is None) != last:
            raise ValueError(f"expected noise in every step but the last; got {'none' if noise is None else 'some'}")
        if noise is None:
            return x0.to(x.dtype)
        a, following = self.signal[step : step + 2]
        h = _log_ratio(following) - _log_ratio(a)
        estimate = _wide(x0)
        if x0_before is not None and step > 0:
            slope = h / (2 * (_log_ratio(a) - _log_ratio(self.signal[step - 1])))
            estimate = estimate + slope * (estimate - _wide(x0_before))
        s, s_following = math.sqrt(1 - a * a), math.sqrt(1 - following * following)
        moved = s_following / s * math.exp(-h) * _wide(x) - math.expm1(-2 * h) * following * estimate
        return (moved + s_following * math.sqrt(-math.expm1(-2 * h)) * _wide(noise)).to(x.dtype)

    def guidance(self, scale: float, step: int, *, exponent: float = 5.0, official: bool = False) -> float:
        """Weight of dynamic guidance, which grows from 1 to nearly 1 + scale over the steps.

            w_k = 1 + scale (1 - cos(pi p_k^exponent)) / 2,    p_k = k / n

        Args:
            scale: 6 for STAR.
            step: k.
            exponent: 5 for STAR.
            official: p_k = (n - t_k) / n as released, with a timestep of training where a step was meant; the weights
                then jump between 1 and 1 + scale.
        """
        steps = len(self.signal)
        place = (steps - int(self.timesteps[step])) / steps if official else step / steps
        return float(1 + scale * (1 - math.cos(math.pi * place**exponent)) / 2)

    def __len__(self) -> int:
        """Timesteps of training."""
        return int(self.config.num_train_timesteps)


def _rescaled(b: Tensor) -> Tensor:
    """Of the noisiest timestep first: to 0 there, and to itself at the last."""
    return (b - b[0]) * (b[-1] / (b[-1] - b[0])) if len(b) > 1 else torch.zeros_like(b)


def _log_ratio(signal: float) -> float:
    """log(a / s), minus infinity without any signal."""
    return math.log(signal) - math.log1p(-signal * signal) / 2 if signal > 0 else -math.inf


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
