"""A student beside its teacher: velocity by noise level, attention and cost by layer, time of a forward, images.

Three models are compared on the same inputs: the teacher (exact attention, original weights), the student, and the swap
alone (the student's attention with the original weights), which says what training brought.

    velocity error = E |p - p_teacher|^2 / E |p_teacher|^2 at each noise level, over held-out samples

`page.py` writes the figures, as JSON, Markdown and a sheet of images.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffattn.measure import hardware, latency, psnr, ssim
from diffattn.mechanisms import SoftmaxAttention
from diffattn.media.pixels import as_pixels

from ..data.samples import Batch, Source
from ..inputs import predict
from ..objective import Noised, add_noise
from ..student import Student
from ..training.capture import Capture
from .picture_metrics import Metric

LEVELS = (0.1, 0.3, 0.5, 0.7, 0.9)
"""Places on the scheduler's training grid at which velocities are compared, 0 the most noise."""
MODELS = ("teacher", "student", "swap alone")


@dataclass(frozen=True)
class Velocity:
    """Errors of a velocity at one noise level, relative to the teacher's power."""

    level: float
    """Share of noise."""
    student: float
    swap_alone: float


@dataclass(frozen=True)
class Layer:
    """One swapped layer in a forward of one sample, half-way through the noise levels."""

    name: str
    grid: str
    """Its tokens."""
    error: float
    """Of the student's output: mean squared error over the teacher's mean square."""
    operations: int
    """Floating-point operations of its attention."""
    full: int
    """The same of full attention."""


@dataclass(frozen=True)
class Speed:
    """Time of a forward with one sample of the evaluation's size; the models take turns, round by round."""

    size: list[int]
    """Of the latents."""
    rounds: int
    seconds: dict[str, dict[str, Any]]
    """By model: `median_s`, `min_s`, `max_s`, `quartiles_s`, `rounds_s`."""
    machine: dict[str, Any]


@dataclass(frozen=True)
class Pictures:
    """Images beside the teacher's, means over the prompts, of clips over all their frames."""

    frames: int
    """Of each."""
    psnr: dict[str, float]
    """dB, of the student and of the swap alone."""
    ssim: dict[str, float] | None
    """None where torchmetrics is not installed."""
    metrics: dict[str, dict[str, float]]
    """By name and model, those of `picture_metrics.py` that were asked for."""


@dataclass(frozen=True)
class Evaluation:
    """All figures of one evaluation."""

    mechanism: dict[str, Any]
    samples: int
    prompts: int
    velocity: tuple[Velocity, ...]
    velocity_error: dict[str, float]
    """Over all levels together, of the student and of the swap alone."""
    attention_error: dict[str, float]
    """By layer, of the student: mean squared error over the teacher's mean square."""
    attention_share: float
    """Of full attention's operations."""
    operations: dict[str, int]
    """Of the attention of all swapped layers, in a forward of one sample: of the teacher and of the student."""
    layers: tuple[Layer, ...]
    speed: Speed | None
    """None where no rounds were asked for."""
    pictures: Pictures | None


@contextlib.contextmanager
def as_model(student: Student, which: str) -> Iterator[None]:
    """The student's model as one of `MODELS` inside the block, without gradients."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        if which == "teacher":
            stack.enter_context(student.teacher())
        elif which == "swap alone":
            stack.enter_context(student.untrained())
        elif which != "student":
            raise ValueError(f"expected one of {', '.join(MODELS)}, got {which!r}")
        yield


def evaluate(
    student: Student,
    scheduler: Any,
    source: Source,
    *,
    samples: int = 32,
    guidance: float | None = None,
    seed: int = 1,
    draw: Callable[[str, int], np.ndarray] | None = None,
    prompts: Sequence[str] = (),
    metrics: Mapping[str, Metric] | None = None,
    rounds: int = 0,
) -> tuple[Evaluation, dict[str, list[np.ndarray]]]:
    """All figures on `samples` of a held-out source, and the images that `draw(prompt, seed)` makes of `prompts`.

    Args:
        metrics: further comparisons of the images, as `picture_metrics.open_metrics` opens them.
        rounds: how often every model's forward is timed; 0 for not at all.
    """
    if metrics and (draw is None or not prompts):
        raise ValueError(f"expected prompts to draw for {', '.join(metrics)}, got none; give some, or leave these out")
    student.model.eval()
    velocity, totals = velocities(student, scheduler, source, samples, guidance, seed)
    layers = layer_figures(student, scheduler, source, samples, guidance, seed)
    operations = {"teacher": sum(one.full for one in layers), "student": sum(one.operations for one in layers)}
    drawn = draw_all(student, draw, prompts, seed) if draw is not None and prompts else {}
    evaluation = Evaluation(
        mechanism=student.handle.layers[0].mechanism.to_dict(),
        samples=samples,
        prompts=len(prompts),
        velocity=velocity,
        velocity_error=totals,
        attention_error={layer.name: layer.error for layer in layers},
        attention_share=operations["student"] / operations["teacher"],
        operations=operations,
        layers=layers,
        speed=speed(student, scheduler, source, guidance, seed, rounds) if rounds else None,
        pictures=compare(drawn, prompts, metrics or {}) if drawn else None,
    )
    return evaluation, drawn


def held_out_batch(source: Source, count: int, level: float, seed: int) -> Batch:
    """`count` samples at one place of the noise grid, the same for every model."""
    generator = torch.Generator().manual_seed(seed)
    chosen = [source.sample(i % len(source), generator) for i in range(count)]
    latents = torch.stack([sample.latents for sample in chosen])
    names = chosen[0].conditioning
    conditioning = {name: torch.stack([sample.conditioning[name] for sample in chosen]) for name in names}
    noise = torch.randn(latents.shape, generator=generator)
    return Batch(latents, conditioning, noise, torch.full((count,), level))


def noised_batch(
    student: Student, scheduler: Any, source: Source, count: int, level: float, seed: int
) -> tuple[Noised, dict[str, Tensor]]:
    """Such a batch on the model's device, noised, and its conditioning."""
    batch = held_out_batch(source, count, level, seed).to(next(student.model.parameters()).device)
    return add_noise(scheduler, batch), batch.conditioning


def velocities(
    student: Student, scheduler: Any, source: Source, count: int, guidance: float | None, seed: int
) -> tuple[tuple[Velocity, ...], dict[str, float]]:
    """The errors at each level, and over all of them."""
    rows: list[Velocity] = []
    power, errors = 0.0, {"student": 0.0, "swap alone": 0.0}
    for level in LEVELS:
        noised, conditioning = noised_batch(student, scheduler, source, count, level, seed)
        found: dict[str, Tensor] = {}
        for which in MODELS:
            with as_model(student, which):
                found[which] = predict(student.model, noised, conditioning, guidance).float()
        own = float(found["teacher"].square().mean())
        squared = {which: float((found[which] - found["teacher"]).square().mean()) for which in errors}
        rows.append(Velocity(float(noised.level[0]), squared["student"] / own, squared["swap alone"] / own))
        power += own
        errors = {which: errors[which] + squared[which] for which in errors}
    return tuple(rows), {which: error / power for which, error in errors.items()}


def layer_figures(
    student: Student, scheduler: Any, source: Source, count: int, guidance: float | None, seed: int
) -> tuple[Layer, ...]:
    """How far each swapped layer's output lies from the teacher's, half-way through the noise levels, and its cost."""
    noised, conditioning = noised_batch(student, scheduler, source, count, 0.5, seed)
    layers = student.handle.layers
    capture, outputs = Capture(student.model, [layer.name for layer in layers]), []
    for which in ("teacher", "student"):
        with as_model(student, which), capture:
            predict(student.model, noised, conditioning, guidance)
        outputs.append([output.float() for output in capture.outputs])
    return tuple(
        Layer(
            name=layer.name,
            grid=str(layer.grid),
            error=float((own - wanted).square().mean() / wanted.square().mean()),
            operations=layer.flops(),
            full=layer.flops(SoftmaxAttention()),
        )
        for layer, wanted, own in zip(layers, *outputs, strict=True)
    )


def speed(student: Student, scheduler: Any, source: Source, guidance: float | None, seed: int, rounds: int) -> Speed:
    """Time a forward of every model in turn, `rounds` times, after one that does not count."""
    noised, conditioning = noised_batch(student, scheduler, source, 1, 0.5, seed)

    def forward(which: str) -> None:
        with as_model(student, which):
            predict(student.model, noised, conditioning, guidance)

    device = noised.latents.device
    found = latency({which: partial(forward, which) for which in MODELS}, rounds, device=device)
    seconds = {which: timing.to_dict() for which, timing in found.items()}
    return Speed(list(noised.latents.shape[1:]), rounds, seconds, hardware(device))


def draw_all(
    student: Student, draw: Callable[[str, int], np.ndarray], prompts: Sequence[str], seed: int
) -> dict[str, list[np.ndarray]]:
    """Every prompt by every model, from the same noise."""
    drawn: dict[str, list[np.ndarray]] = {}
    for which in MODELS:
        with as_model(student, which):
            drawn[which] = [draw(prompt, seed + number) for number, prompt in enumerate(prompts)]
    return drawn


def compare(
    drawn: dict[str, list[np.ndarray]], prompts: Sequence[str] = (), metrics: Mapping[str, Metric] | None = None
) -> Pictures:
    """PSNR and SSIM of the student's images, and of the swap's, to the teacher's; further metrics of all three.

    Clips `(frames, height, width, 3)` are compared frame by frame.
    """
    frames = len(drawn["teacher"][0]) if drawn["teacher"][0].ndim == 4 else 1
    if frames > 1:
        drawn = {which: [frame for clip in clips for frame in clip] for which, clips in drawn.items()}
        prompts = [prompt for prompt in prompts for _ in range(frames)]
    others = [which for which in MODELS if which != "teacher"]

    def mean(metric: Callable[[Any, Any], float], which: str) -> float:
        pairs = zip(drawn[which], drawn["teacher"], strict=True)
        return float(np.mean([min(metric(as_pixels(own), as_pixels(wanted)), 99.0) for own, wanted in pairs]))

    try:
        similar = {which: mean(ssim, which) for which in others}
    except ImportError:
        similar = None
    further = {
        name: {which: metric(drawn[which], drawn["teacher"], prompts) for which in MODELS}
        for name, metric in (metrics or {}).items()
    }
    return Pictures(frames, {which: mean(psnr, which) for which in others}, similar, further)
