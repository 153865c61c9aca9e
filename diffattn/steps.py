"""Which denoising step a pipeline is at, counted from the outside.

Few pipelines tell their models the step, some schedulers have no step index, some models get the timestep reversed,
and guidance may call a model twice a step. So a step is a change of the timestep that the models receive, and a run
starts when the scheduler has new timesteps: `set_timesteps`, which every run calls, makes a new tensor.
"""

import weakref
from typing import Any

from torch import Tensor

NOT_FLOW_MATCHING = ("sigma_data", "sigma_max")
"""Config names of schedulers that count sigma from 0 to infinity, though they have no `alphas_cumprod`."""


class StepCounter:
    """Counts the denoising steps of one pipeline; shared by all its models."""

    def __init__(self, pipeline: Any) -> None:
        self._pipeline = weakref.ref(pipeline)
        self._schedule: Tensor | None = None
        self._timestep: float | None = None
        self.step = 0

    def update(self, timestep: Tensor | float) -> None:
        """Take the timestep of one model call; of per-token timesteps the largest counts."""
        value = float(timestep.max()) if isinstance(timestep, Tensor) else float(timestep)
        schedule = self._timesteps()
        if self._timestep is None or schedule is not self._schedule:
            self.step = 0
        elif value != self._timestep:
            self.step += 1
        self._schedule, self._timestep = schedule, value

    @property
    def total(self) -> int:
        """Steps of this run: those that are executed, so fewer than asked for in image-to-image."""
        return len(self._executed().unique_consecutive())

    @property
    def progress(self) -> float:
        """Fraction of this run's steps already done, in [0, 1)."""
        return min(self.step / self.total, 1.0)

    @property
    def sigma(self) -> float:
        """Share of noise in the latents at this step, see `noise_share`."""
        timesteps, executed = self._timesteps(), self._executed()
        first = len(timesteps) - len(executed)
        counts = executed.unique_consecutive(return_counts=True)[1].tolist()
        before = sum(counts[: min(self.step, len(counts) - 1)])
        return noise_share(getattr(self._pipeline(), "scheduler", None), first + before)

    def _executed(self) -> Tensor:
        """The timesteps of this run: its last ones in image-to-image."""
        timesteps = self._timesteps()
        return timesteps[-(getattr(self._pipeline(), "_num_timesteps", None) or len(timesteps)) :]

    def _timesteps(self) -> Tensor:
        scheduler = getattr(self._pipeline(), "scheduler", None)
        timesteps = getattr(scheduler, "timesteps", None)
        if not isinstance(timesteps, Tensor):
            raise ValueError(
                f"steps are counted by scheduler.timesteps, but {type(scheduler).__name__} of this pipeline has none; "
                f"apply without steps= and with a mechanism that has no step schedule"
            )
        return timesteps


def noise_share(scheduler: Any, index: int) -> float:
    """s = 1/(1 + sqrt(SNR)) of the latents at `scheduler.timesteps[index]`: from 0 (clean) to 1 (pure noise).

    With x = a * clean + b * noise it is b / (a + b). Flow matching has a = 1 - sigma and b = sigma, so s = sigma; other
    schedulers with sigmas have b / a = sigma, and those without have a^2 = alphas_cumprod[t]. This is read from the
    scheduler, not from the model's timestep, which some models get reversed or in other units.
    """
    options = getattr(scheduler, "config", {})
    sigmas, alphas = getattr(scheduler, "sigmas", None), getattr(scheduler, "alphas_cumprod", None)
    if isinstance(sigmas, Tensor) and len(sigmas) >= len(scheduler.timesteps):
        sigma = float(sigmas[index])
        no_flow = isinstance(alphas, Tensor) or any(name in options for name in NOT_FLOW_MATCHING)
        if options.get("use_flow_sigmas", False) or not no_flow:
            return 1 - sigma if options.get("invert_sigmas", False) else sigma
        return 1 - 1 / (1 + sigma)
    if isinstance(alphas, Tensor):
        signal = float(alphas[round(float(scheduler.timesteps[index]))])
        return (1 - signal) ** 0.5 / (signal**0.5 + (1 - signal) ** 0.5)
    raise ValueError(
        f"the share of noise is read from a scheduler's sigmas or alphas_cumprod, and {type(scheduler).__name__} has "
        f"neither; tell the phases by the timestep: phase_by='timestep'"
    )
