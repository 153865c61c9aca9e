"""Which denoising step a pipeline is at, counted from the outside.

Few pipelines tell their models the step, some schedulers have no step index, some models get the timestep reversed,
and guidance may call a model twice a step. So a step is a change of the timestep that the models receive, and a run
starts when the scheduler has new timesteps: `set_timesteps`, which every run calls, makes a new tensor.
"""

import weakref
from typing import Any

from torch import Tensor


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
        timesteps = self._timesteps()
        executed = getattr(self._pipeline(), "_num_timesteps", None) or len(timesteps)
        return len(timesteps[-executed:].unique_consecutive())

    @property
    def progress(self) -> float:
        """Fraction of this run's steps already done, in [0, 1)."""
        return min(self.step / self.total, 1.0)

    def _timesteps(self) -> Tensor:
        scheduler = getattr(self._pipeline(), "scheduler", None)
        timesteps = getattr(scheduler, "timesteps", None)
        if not isinstance(timesteps, Tensor):
            raise ValueError(
                f"steps are counted by scheduler.timesteps, but {type(scheduler).__name__} of this pipeline has none; "
                f"apply without steps= and with a mechanism that has no step schedule"
            )
        return timesteps
