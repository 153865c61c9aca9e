"""Which denoising step a model call belongs to: a step of the scheduler that runs.

Few pipelines tell their models the step. The scheduler that runs is that of the pipeline that runs, which is found on
the call stack: pipelines are copied, share their models and are made from one another, and one that was not there at
`apply` is as good as that one. A loop written by hand is one around its own `pipe` or `pipeline`; one that holds none
is around the pipeline given to `apply`.

Where it stands, its place in `scheduler.timesteps`, is the scheduler's own step index or counter. The older ones have
neither: for them it is the place of the timestep that the model got, or the number of its changes. Several places
make a step in schedulers of second order and in PNDM's Runge-Kutta start, as `step_numbers` has them.

A run lasts until the scheduler has new timesteps: `set_timesteps`, which every run calls, makes a new tensor.
"""

import collections
import itertools
import sys
import threading
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import FrameType
from typing import Any

from torch import Tensor, nn

NOT_FLOW_MATCHING = ("sigma_data", "sigma_max")
"""Config names of schedulers that count sigma from 0 to infinity, though they have no `alphas_cumprod`."""
RUNGE_KUTTA_CALLS = 4
"""Model calls in a step of PNDM's start."""
OWN, BY_HAND = ("self", "components"), ("pipe", "pipeline")
"""Names by which the functions of pipelines and of modular blocks hold their pipeline, and loops by hand theirs."""


@dataclass(frozen=True)
class Moment:
    """A step of a run, and the place in `scheduler.timesteps` that the model call belongs to."""

    step: int
    total: int
    place: int
    sigma: float | None = None
    """Share of noise in the latents, see `noise_share`; None where nobody asked."""
    skipped: int = 0
    """Steps of the schedule before the run's first: image-to-image begins late."""

    @property
    def progress(self) -> float:
        """Share of the schedule, from pure noise on, that is behind, in [0, 1)."""
        return min((self.skipped + self.step) / (self.skipped + self.total), 1.0)


@dataclass(frozen=True)
class Caller:
    """The pipeline whose scheduler counts."""

    pipeline: Any
    inside: bool = False
    """Is it running? Outside, a scheduler that has not begun may never be asked to: a loop by hand."""
    executed: int | None = None
    """Timesteps that it goes through; None: all."""


class Run:
    """One run of a scheduler, and what lives as long: what was computed, and what mechanisms keep (`memory`)."""

    def __init__(self, schedule: Tensor | None) -> None:
        self.schedule = schedule
        self.place = 0
        """Of the last model call."""
        self.first: int | None = None
        """That of the first one, where the scheduler does not tell."""
        self.timestep: float | None = None
        self.done: dict[Any, Any] = {}
        """What the swapped layers did, see `diffattn.swap.calls.records`."""
        self.kept: dict[Any, tuple[Any, dict[str, Any]]] = {}
        self._samples: tuple[int, collections.Counter[Any]] = (-1, collections.Counter())
        self.number = next(_numbers)

    def occurrence(self, text: Any) -> int:
        """How many calls of this step had the same text before."""
        place, seen = self._samples
        if place != self.place:
            seen = collections.Counter()
            self._samples = self.place, seen
        seen[text] += 1
        return seen[text] - 1

    def memory(self, key: Any, shape: Any) -> dict[str, Any]:
        """What a mechanism kept under `key` in this run; empty at first, and after its shape has changed."""
        known = self.kept.get(key)
        if known is None or known[0] != shape:
            known = self.kept[key] = (shape, {})
        return known[1]


_numbers = itertools.count()


class Runs:
    """The runs that the swapped models of one `apply` are in: one for each scheduler. Safe in threads.

    A deep copy starts without any.
    """

    def __init__(self, pipeline: Any = None) -> None:
        self._pipeline = None if pipeline is None else weakref.ref(pipeline)
        self._runs: weakref.WeakKeyDictionary[Any, Run] = weakref.WeakKeyDictionary()
        self.lock = threading.Lock()

    def __deepcopy__(self, memo: dict[int, Any]) -> "Runs":
        given = self._pipeline() if self._pipeline is not None else None
        return Runs(memo.get(id(given), given))

    def caller_of(self, model: nn.Module) -> Caller:
        """What calls `model` now; in a loop that holds no pipeline, the one given to `apply`, or none."""
        return find_caller(model) or Caller(None if self._pipeline is None else self._pipeline())

    def enter(self, pipeline: Any) -> Run | None:
        """The run that the pipeline's scheduler is in; None without a scheduler that has timesteps."""
        scheduler = getattr(pipeline, "scheduler", None)
        schedule = getattr(scheduler, "timesteps", None)
        if not isinstance(schedule, Tensor):
            return None
        with self.lock:
            run = self._runs.get(scheduler)
            if run is None or run.schedule is not schedule:
                run = self._runs[scheduler] = Run(schedule)
            return run

    def moment(self, caller: Caller, timestep: Callable[[], float], with_sigma: bool = False) -> Moment:
        """Where the caller's run stands; `timestep` gives that of the model call, and may wait for the device.

        Raises `ValueError` where the scheduler has no timesteps.
        """
        pipeline = caller.pipeline
        scheduler: Any = getattr(pipeline, "scheduler", None)
        run = self.enter(pipeline)
        if run is None:
            what = "no pipeline runs, and the one given to apply is gone" if pipeline is None else (
                f"{type(scheduler).__name__} of {type(pipeline).__name__} has none"
            )  # fmt: skip
            raise ValueError(
                f"steps are counted by scheduler.timesteps, but {what}; apply without steps= and with a mechanism "
                f"that has no step schedule"
            )
        length = len(scheduler.timesteps)
        executed = min(caller.executed or length, length)
        with self.lock:
            place, first = _place(scheduler, run, length, executed, timestep, caller.inside)
            if place < run.place:  # the scheduler began again by itself
                run.kept.clear()
            run.place = place
        every = step_numbers(scheduler)
        numbers = every[: max(1, place - first + 1, min(executed, length - first))]
        step = numbers[min(max(place - first, 0), len(numbers) - 1)]
        sigma = noise_share(scheduler, place) if with_sigma else None
        return Moment(step, numbers[-1] + 1, place, sigma, skipped=every[first])


def _place(
    scheduler: Any, run: Run, length: int, executed: int, timestep: Callable[[], float], inside: bool
) -> tuple[int, int]:
    """Index into `scheduler.timesteps` of the next model call, and of the first one of the run."""
    begin = getattr(scheduler, "begin_index", None)
    first = length - executed if begin is None else begin
    if getattr(scheduler, "step_index", None) is not None:
        place = scheduler.step_index
    elif inside and hasattr(scheduler, "step_index"):
        place = first
    elif hasattr(scheduler, "counter"):  # PNDM's counts from 0 wherever it begins
        place = first + scheduler.counter
    else:
        place = _place_by_timestep(run, first, timestep(), known=not hasattr(scheduler, "step_index"))
        run.first = min(first, place) if run.first is None else run.first
        first = run.first
    return min(int(place), length - 1), min(int(first), length - 1)


def _place_by_timestep(run: Run, first: int, value: float, known: bool) -> int:
    """Where the model's timestep stands in the schedule; where it does not, or twice, the number of its changes.

    Only models of the older schedulers get the timestep as it is `known` to the scheduler.
    """
    assert run.schedule is not None
    found = (run.schedule.detach().cpu().double() == value).nonzero().flatten().tolist() if known else []
    counted = first if run.timestep is None else run.place + (value != run.timestep)
    run.timestep = value
    return found[0] if len(found) == 1 else counted


def step_numbers(scheduler: Any) -> list[int]:
    """The step of each model call of a run, from 0; as many as `scheduler.timesteps`.

    Schedulers of second order list two calls for each step but the last, where they ask for both. PNDM starts with
    four calls a step, or with two for its first one where `skip_prk_steps`.
    """
    length, asked = len(scheduler.timesteps), getattr(scheduler, "num_inference_steps", None)
    order = getattr(scheduler, "order", 1) or 1
    if hasattr(scheduler, "prk_timesteps"):
        start = 0 if scheduler.config.skip_prk_steps else len(scheduler.prk_timesteps)
        steps = [call // RUNGE_KUTTA_CALLS for call in range(start)] if start else [0]
        after = steps[-1] + 1 if start else 0
        return steps + list(range(after, after + length - len(steps)))
    if order == 1 or asked is None or length <= asked:
        return list(range(length))
    return [call // order for call in range(length)]


def find_caller(model: nn.Module) -> Caller | None:
    """The innermost function on the call stack that holds a pipeline with `model` among its parts and a scheduler."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        for name in (*OWN, *BY_HAND):
            if name in frame.f_code.co_varnames:
                holder = frame.f_locals.get(name)
                if holder is not None and _runs(holder, model):
                    return _caller(holder, frame.f_locals.get("timesteps")) if name in OWN else Caller(holder)
        frame = frame.f_back
    return None


def _caller(pipeline: Any, timesteps: Any) -> Caller:
    """A pipeline that runs; its function's own `timesteps` are those that it goes through, fewer in image-to-image."""
    if isinstance(timesteps, (Tensor, list)) and len(timesteps):
        return Caller(pipeline, inside=True, executed=len(timesteps))
    return Caller(pipeline, inside=True, executed=getattr(pipeline, "_num_timesteps", None))


def _runs(holder: Any, model: nn.Module) -> bool:
    attributes = {} if isinstance(holder, nn.Module) else getattr(holder, "__dict__", {})
    if attributes.get("scheduler") is None:
        return False
    parts = single_models(part for part in attributes.values() if isinstance(part, nn.Module))
    return any(part is model for part in parts)


def single_models(parts: Iterable[nn.Module]) -> list[nn.Module]:
    """The models among parts of a pipeline, each once: the nets of diffusers' Multi...ControlNetModel classes too."""
    found: dict[int, nn.Module] = {}
    for part in map(unwrap, parts):
        nets = getattr(part, "nets", None)
        for model in map(unwrap, nets) if isinstance(nets, nn.ModuleList) else [part]:
            found[id(model)] = model
    return list(found.values())


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside `torch.compile(model)`."""
    return getattr(model, "_orig_mod", model)


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
