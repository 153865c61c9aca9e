"""The sampler of STAR: a schedule of interpolated log-SNR, and second-order SDE-DPM-Solver++ from a noised start.

    l(t)       = -2 ln tan(a + (b - a) t/T),    tan a = exp(-l_max / 2), tan b = exp(-l_min / 2), T = 999
    logSNR(t)  = l(t) + (1 - t/T) 2 ln(1 / scale_min) + (t/T) 2 ln(1 / scale_max)
    sigma(t)   = sqrt(sigmoid(-logSNR(t))), stretched over its range so that sigma(T) = 1;    alpha = sqrt(1 - sigma^2)

States are variance preserving, x = alpha x0 + sigma eps, as everywhere in diffusers: a network sees them as they are.
The solver works at fractional timesteps, with sigma/alpha interpolated in its logarithm; the network is told the
rounded timestep, and x0 = alpha x - sigma v is formed with the table's values at that.

Sources: simple diffusion, Hoogeboom, Heek, Salimans, 2023, https://arxiv.org/abs/2301.11093, for the shifted and
interpolated schedule; DPM-Solver++, Lu et al., 2022, https://arxiv.org/abs/2211.01095, for the solver; STAR, Xie et
al., 2025, https://arxiv.org/abs/2501.02976, whose released code fixes these numbers.
"""

import math

import torch
from diffusers import DPMSolverMultistepScheduler
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin, SchedulerOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

# diffusers looks for the class that knows how to load a component in the component's own module.
__all__ = ["STARScheduler", "SchedulerMixin"]

MODES = ("fast", "trailing")
FAST_STEPS = 15
"""What the released code counts as steps in its fast mode. It makes 14 evaluations of them."""
FAST_SPLIT = 500
"""The timestep that splits the fast mode into its sparse and its dense part."""


def logsnr_sigmas(
    timesteps: int, scale_min: float, scale_max: float, logsnr_min: float = -15.0, logsnr_max: float = 15.0
) -> Tensor:
    """sigma(t) for t = 0 .. timesteps - 1, float32.

    Every operation is worked out in float64 and rounded to float32. So this is the chain of float32 operations that the
    networks were trained with, where near sigma = 1 rounding is all that is left of alpha, and yet the same on every
    CPU: in float32 itself their tan, log and exp differ in the last bit. What follows the root is rounded alike by all.
    """
    angle_min, angle_max = (math.atan(math.exp(-0.5 * logsnr)) for logsnr in (logsnr_max, logsnr_min))
    share = _rounded(torch.linspace(1, 0, timesteps, dtype=torch.float64))
    angle = _rounded(_float32(angle_max) + _rounded(share * _float32(angle_min - angle_max)))
    cosine = -2 * _rounded(_rounded(angle.tan()).log())
    near, far = (_rounded(cosine + _float32(2 * math.log(1 / scale))) for scale in (scale_min, scale_max))
    logsnr = _rounded(_rounded(share * near) + _rounded(_rounded(1 - share) * far))
    sigmas = _rounded(1 / _rounded(1 + _rounded(logsnr.exp()))).sqrt().float()
    first, last = sigmas[0], sigmas[-1]
    return first + (sigmas - first) * ((1 - first) / (last - first))


def _rounded(values: Tensor) -> Tensor:
    """float64 numbers that float32 has."""
    return values.float().double()


def _float32(value: float) -> float:
    return float(_rounded(torch.tensor(value, dtype=torch.float64)))


def trailing_times(start: int, count: int) -> list[float]:
    """`count` evenly spaced timesteps from `start` towards 0, of which the last is one spacing above -1.

    >>> trailing_times(899, 4)
    [899.0, 674.0, 449.0, 224.0]
    """
    return [start - k * (start + 1) / count for k in range(count)]


def fast_times(start: int, count: int) -> list[float]:
    """`count` timesteps, 4 of 15 evenly spaced from `start` down to 500 exclusive, the rest from 500 towards 0.

    >>> [round(time) for time in fast_times(899, 15)]
    [899, 799, 699, 599, 500, 454, 409, 363, 318, 272, 227, 181, 136, 90, 45]
    """
    above = max(1, round(count * 4 / 15))
    spacing = (start - FAST_SPLIT + 1) / above
    return [start - k * spacing for k in range(above)] + trailing_times(FAST_SPLIT, count - above)


class STARScheduler(DPMSolverMultistepScheduler):  # type: ignore[misc]
    """SDE-DPM-Solver++ of second order (midpoint, eta = 1) for a network that predicts v = alpha eps - sigma x0.

    Two ways to use it, with the same numbers:

    - `step(v, t, x)`, as any scheduler of diffusers, which remembers the last x0;
    - `predict_x0` and `update`, which remember nothing. They work element by element, so a clip may pass through them
      in blocks of frames.

    >>> scheduler = STARScheduler()
    >>> scheduler.set_timesteps(15)
    >>> scheduler.timesteps.tolist()
    [899, 799, 699, 599, 500, 454, 409, 363, 318, 272, 227, 181, 136, 90]

    Half precision is worked out in float32; results have the dtype of the state x.

    Args:
        mode: "fast" spends 11 of 15 steps below timestep 500, "trailing" spaces all evenly.
        t_start: timestep of the noised start, where the first step begins.
    """

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        scale_min: float = 2.0,
        scale_max: float = 4.0,
        logsnr_min: float = -15.0,
        logsnr_max: float = 15.0,
        mode: str = "fast",
        t_start: int = 899,
    ) -> None:
        if mode not in MODES:
            raise ValueError(f"expected a mode of {' or '.join(map(repr, MODES))}; got {mode!r}; use one of them")
        lowest = FAST_SPLIT if mode == "fast" else 0
        if not lowest < t_start < num_train_timesteps - 1:
            raise ValueError(
                f"expected a t_start from {lowest + 1} to {num_train_timesteps - 2} in mode {mode!r}; got {t_start}; "
                "899 is usual"
            )
        super().__init__(
            num_train_timesteps=num_train_timesteps, algorithm_type="sde-dpmsolver++", prediction_type="v_prediction"
        )
        self.sigma_t = logsnr_sigmas(num_train_timesteps, scale_min, scale_max, logsnr_min, logsnr_max)
        self.alpha_t = torch.sqrt(1 - self.sigma_t**2)
        self.alphas_cumprod = self.alpha_t**2
        self.alphas = self.alphas_cumprod / torch.cat([torch.ones(1), self.alphas_cumprod[:-1]])
        self.betas = 1 - self.alphas
        self.lambda_t = torch.log(self.alpha_t.double() / self.sigma_t.double()).float()
        self.sigmas = self.sigma_t / self.alpha_t

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        """Choose the timesteps for so many evaluations of the network.

        n evaluations take n + 1 values of `trailing_times` or `fast_times` without the last one; the last step goes
        from the n-th to x0. In the fast mode 15 is the released default and means 14 evaluations, as released, the
        same as 14. The released code makes those 14 whatever number it is given.

        Raises:
            ValueError: below 1, or so many that two steps would have the same timestep.
        """
        mode, start = self.config.mode, self.config.t_start
        if num_inference_steps < 1:
            raise ValueError(f"expected at least 1 step; got {num_inference_steps}; 15 are usual")
        count = num_inference_steps + (0 if (mode, num_inference_steps) == ("fast", FAST_STEPS) else 1)
        times = (fast_times if mode == "fast" else trailing_times)(start, count)[:-1]
        rounded = torch.tensor(times).round().long()
        if len(rounded.unique()) < len(rounded):
            raise ValueError(
                f"expected few enough steps for different timesteps from {start} in mode {mode!r}; got "
                f"{num_inference_steps}; use fewer"
            )
        self.num_inference_steps = len(times)
        self.timesteps, self._rounded = rounded.to(device), rounded.tolist()
        self.sigmas = torch.cat([self._solver_sigmas(torch.tensor(times)), torch.zeros(1)])
        self.model_outputs: list[Tensor | None] = [None]
        self._step_index: int | None = None
        self._begin_index: int | None = None

    def _solver_sigmas(self, times: Tensor) -> Tensor:
        """sigma/alpha at fractional timesteps, interpolated in the logarithm."""
        table = (self.sigma_t.double() / self.alpha_t.double()).log()
        low = times.floor().long()
        return torch.lerp(table[low], table[low + 1], times.double() - low).exp().float()

    def noised(self, z: Tensor, noise: Tensor) -> Tensor:
        """alpha z + sigma noise at `t_start`."""
        return self.add_noise(z, noise, torch.tensor([self.config.t_start]))

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """alpha(t) z + sigma(t) noise by the table, for whole timesteps of training, one or one for each sample."""
        shape = (-1,) + (1,) * (original_samples.ndim - 1)
        wide = _wide(original_samples.dtype)
        alpha, sigma = (
            table[timesteps.to(table.device)].reshape(shape).to(original_samples.device, wide)
            for table in (self.alpha_t, self.sigma_t)
        )
        return (alpha * original_samples + sigma * noise.to(wide)).to(original_samples.dtype)

    def start(self, noised: Tensor) -> Tensor:
        """The first state, sigma(t_start) times the noised latents.

        So the released sampler does: it multiplies them by sigma/alpha instead of 1/alpha, as if they were all noise.
        """
        return float(self.sigma_t[self.config.t_start]) * noised

    def model_input(self, x: Tensor, step: int) -> Tensor:
        """What the network is given in a step: the state itself, which is variance preserving."""
        self._check_step(step)
        return x

    def predict_x0(self, x: Tensor, v: Tensor, step: int) -> Tensor:
        """x0 = alpha x - sigma v at the timestep of a step, in the dtype of x."""
        self._check_step(step)
        return self.x0_at(x, v, self._rounded[step])

    def x0_at(self, x: Tensor, v: Tensor, timestep: int) -> Tensor:
        """x0 = alpha(t) x - sigma(t) v at any whole timestep, in the dtype of x."""
        wide = _wide(x.dtype)
        alpha, sigma = float(self.alpha_t[timestep]), float(self.sigma_t[timestep])
        return (alpha * x.to(wide) - sigma * v.to(wide)).to(x.dtype)

    def update(self, x: Tensor, x0: Tensor, x0_before: Tensor | None, step: int, noise: Tensor | None) -> Tensor:
        """The state after a step, from sigma_s, alpha_s to sigma_t, alpha_t.

            x_t = (sigma_t / sigma_s) e^-h x + alpha_t (1 - e^-2h) (x0 + D / 2) + sigma_t sqrt(1 - e^-2h) noise
            D   = (h / h_before) (x0 - x0_before),    h = ln(alpha_t / sigma_t) - ln(alpha_s / sigma_s)

        The last step, to sigma_t = 0, gives x0.

        Args:
            x: state before the step, any block of it; the other tensors are of the same block.
            x0_before: x0 of the step before; None gives a step of first order, D = 0, as in the first step.
            noise: unit normal; not looked at in the last step.

        Raises:
            ValueError: no such step, x0_before in the first one, or no noise before the last one.
        """
        self._check_step(step)
        if step == 0 and x0_before is not None:
            raise ValueError("expected no x0_before in step 0; got one; pass None")
        if step == len(self._rounded) - 1:
            return x0.to(x.dtype)
        if noise is None:
            raise ValueError(f"expected noise in step {step} of {len(self._rounded)}; got None; draw a unit normal")
        wide = _wide(x.dtype)
        of_x, of_x0, of_change, of_noise = self._factors(step)
        following = of_x * x.to(wide) + of_x0 * x0.to(wide) + of_noise * noise.to(wide)
        if x0_before is not None:
            following += of_change * (x0.to(wide) - x0_before.to(wide))
        return following.to(x.dtype)

    def _factors(self, step: int) -> tuple[float, float, float, float]:
        """Of x, x0, x0 - x0_before and the noise in `update`, for all steps but the last."""
        before, here, there = (float(self.sigmas[max(0, k)]) for k in (step - 1, step, step + 1))
        h, h_before = math.log(here / there), math.log(before / here)
        alpha_t = 1 / math.hypot(1, there)
        sigma_t, sigma_s = there * alpha_t, here / math.hypot(1, here)
        gain = -math.expm1(-2 * h)
        of_change = 0.5 * alpha_t * gain * h / h_before if step > 0 else 0.0
        return sigma_t / sigma_s * math.exp(-h), alpha_t * gain, of_change, sigma_t * math.sqrt(gain)

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        generator: torch.Generator | None = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor]:
        """One step with the x0 of the one before in memory: `predict_x0` and `update`.

        Args:
            model_output: v.
            timestep: one of `timesteps`; it says where to begin, and the following steps are counted.
            sample: x, the state.
            variance_noise: unit normal, instead of a draw from `generator` in float32.
        """
        if self.num_inference_steps is None:
            raise ValueError("expected timesteps; got none; call set_timesteps first")
        if self.step_index is None:
            if self.begin_index is None and int(timestep) not in self._rounded:
                raise ValueError(
                    f"expected one of the timesteps {self._rounded}; got {int(timestep)}; pass them in turn"
                )
            self._init_step_index(timestep)
        step = self.step_index
        self._check_step(step)
        if variance_noise is None and step < len(self._rounded) - 1:
            variance_noise = randn_tensor(sample.shape, generator=generator, device=sample.device, dtype=torch.float32)
        x0 = self.predict_x0(sample, model_output, step)
        following = self.update(sample, x0, self.model_outputs[-1], step, variance_noise)
        self.model_outputs, self._step_index = [x0], step + 1
        return SchedulerOutput(prev_sample=following) if return_dict else (following,)

    def _check_step(self, step: int) -> None:
        if self.num_inference_steps is None or not 0 <= step < self.num_inference_steps:
            raise ValueError(
                f"expected a step from 0 to below {self.num_inference_steps}; got {step}; call set_timesteps first, "
                "and again for another clip"
            )


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
