"""A model that the page offers, and what it draws."""

import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

import numpy as np

from ..comparison import Drawn, Setting, draw
from ..measure import flicker, psnr_of_frames
from ..measure.draws import Draws, least_side, makes_video
from ..measure.strips import to_image
from ..measure.watching import Caught, check_seen, watch
from ..mechanisms.base import Mechanism, Seen
from ..options import Must, at_least, check_fields
from ..swap.apply import apply
from .jobs import Job, Queue

WARMUP = 2
"""Steps of a first run, untimed, of a setting at a size that was not drawn by it before."""

Side = Annotated[int | None, at_least(1)]


@dataclass(frozen=True, kw_only=True)
class Wish:
    """What to draw; None leaves the choice to the pipeline. Raises `ValueError` for values that can mean nothing."""

    prompt: str
    seed: Annotated[int, Must("a whole number from 0 to 2^63 - 1", lambda value: 0 <= value < 2**63)] = 0
    height: Side = None
    width: Side = None
    frames: Side = None
    steps: Annotated[int | None, Must("a whole number from 1 to 10000", lambda value: 1 <= value <= 10_000)] = None

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(eq=False)
class Model:
    """An open pipeline, the arguments that a bundled one was trained for, and its queue."""

    name: str
    pipe: Any
    native: dict[str, Any] = field(default_factory=dict)
    queue: Queue = field(default_factory=Queue)
    warm: set[Any] = field(default_factory=set)
    """Settings and sizes that were drawn before."""

    def __post_init__(self) -> None:
        self.pipe.set_progress_bar_config(disable=True)
        with apply(self.pipe, "softmax") as handle:
            self.layers = tuple(layer.name for layer in handle.layers)
            self.heads = max(int(getattr(layer.module, "heads", 1) or 1) for layer in handle.layers)

    @property
    def makes_video(self) -> bool:
        return makes_video(self.pipe)

    def draws(self, wish: Wish) -> Draws:
        """The call; raises `ValueError` for what the pipeline does not take."""
        given = {
            "height": wish.height,
            "width": wish.width,
            "num_frames": wish.frames,
            "num_inference_steps": wish.steps,
        }
        given = {name: value for name, value in given.items() if value is not None}
        for name in given:
            if name not in self._takes:
                raise ValueError(f"{type(self.pipe).__name__} takes no {name}; leave it empty")
        least = least_side(self.pipe)
        for name, side in (("height", wish.height), ("width", wish.width)):
            if side is not None and side < least:
                raise ValueError(f"expected a {name} of at least {least} pixels, got {side}")
        return Draws(self.pipe, [wish.prompt], wish.seed, {**self.native, **given})

    def steps_of(self, draws: Draws) -> int:
        """Denoising steps of a call; 0 where nothing tells."""
        parameter = self._takes.get("num_inference_steps")
        told = draws.calls[0].get("num_inference_steps", getattr(parameter, "default", None))
        return told if isinstance(told, int) else 0

    def following(self, job: Job) -> dict[str, Any]:
        """Arguments of the call that tell a job its steps, and stop it between two."""
        if "callback_on_step_end" in self._takes:

            def ended(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
                job.tick(step + 1)
                return {}

            return {"callback_on_step_end": ended}
        if "callback" in self._takes:
            return {"callback": lambda step, timestep, latents: job.tick(step + 1), "callback_steps": 1}
        return {}

    @property
    def _takes(self) -> dict[str, inspect.Parameter]:
        return dict(inspect.signature(type(self.pipe).__call__).parameters)


@dataclass(frozen=True)
class Pair:
    """The same noise under two settings."""

    names: tuple[str, str]
    drawn: tuple[Drawn, Drawn]
    psnr: tuple[float, ...]
    """Of each frame, in dB; one of an image."""
    flicker: float | None
    """Of videos."""

    @property
    def mean(self) -> float:
        """PSNR in dB, the mean over the frames."""
        return float(np.mean(self.psnr)) if all(map(math.isfinite, self.psnr)) else math.inf


def draw_pair(model: Model, wish: Wish, settings: Sequence[Setting], job: Job) -> Pair:
    """Draw a wish under two settings, each of which is tried before anything is drawn."""
    draws = model.draws(wish)
    for setting in settings:
        with setting.on(model.pipe):
            pass
    steps, follow = model.steps_of(draws), model.following(job)
    drawn = []
    for place, setting in zip("AB", settings, strict=True):
        size = tuple(draws.calls[0].get(name) for name in ("height", "width", "num_frames"))
        if (setting.meaning, size) not in model.warm:
            job.tell(f"warming up {place}: {setting.name}", WARMUP)
            draw(draws, 0, setting, **follow, num_inference_steps=WARMUP)
            model.warm.add((setting.meaning, size))
        job.tell(f"drawing {place}: {setting.name}", steps)
        drawn.append(draw(draws, 0, setting, **follow))
    job.check()
    return pair_of((settings[0].name, settings[1].name), (drawn[0], drawn[1]))


def pair_of(names: tuple[str, str], drawn: tuple[Drawn, Drawn]) -> Pair:
    """Two images, or two videos, of one size, and how far they are apart."""
    first, second = (one.pixels if one.pixels.ndim == 4 else one.pixels[None] for one in drawn)
    return Pair(names, drawn, psnr_of_frames(second, first), flicker(first, second) if len(first) > 1 else None)


@dataclass(eq=False)
class Seeing:
    """A call of a layer, caught, and what its queries see."""

    image: Any
    caught: Caught
    seen: Seen

    @property
    def heads(self) -> int:
        return int(self.caught.q.shape[1])


def see(model: Model, wish: Wish, mechanism: Mechanism, layer: str, step: int, job: Job) -> Seeing:
    """Draw under a mechanism, and keep what one layer was asked in one step, counted from 0."""
    check_seen(mechanism)
    draws = model.draws(wish)
    steps = model.steps_of(draws)
    if steps and step >= steps:
        raise ValueError(f"the run has steps 0 to {steps - 1}, got step {step}")
    job.tell(f"drawing by {mechanism}", steps)
    follow = model.following(job)
    pixels, caught = watch(model.pipe, mechanism, lambda: draws.draw(0, **follow), layer=layer, step=step)
    job.tell("looking at the layer")
    return Seeing(to_image(pixels), caught, caught.seen())
