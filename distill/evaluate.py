"""A student beside its teacher: velocity by noise level, attention by layer, pictures, cost. JSON, Markdown, a sheet.

Three models are compared on the same inputs: the teacher (exact attention, original weights), the student, and the swap
alone (the student's attention with the original weights), which says what training brought.

    velocity error = E |p - p_teacher|^2 / E |p_teacher|^2 at each noise level, over held-out samples
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffattn.draw import Entry, sheet
from diffattn.files import write_json, write_text, written
from diffattn.measure import as_pixels, psnr, ssim
from diffattn.mechanisms import Mechanism, SoftmaxAttention

from .capture import Capture
from .data import Batch, Source
from .inputs import predict
from .objective import add_noise
from .student import Student

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
class Pictures:
    """Pictures beside the teacher's, means over the prompts."""

    psnr: dict[str, float]
    """dB, of the student and of the swap alone."""
    ssim: dict[str, float] | None
    """None where torchmetrics is not installed."""


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
    pictures: Pictures | None


def operations(student: Student, mechanism: Mechanism | None = None) -> int:
    """What the swapped layers compute in a forward like the last one, by their own mechanism or by another."""
    return sum(layer.flops(mechanism or layer.mechanism) for layer in student.handle.layers if layer.grid is not None)


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
) -> tuple[Evaluation, dict[str, list[np.ndarray]]]:
    """All figures on `samples` of a held-out source, and the pictures that `draw(prompt, seed)` makes of `prompts`."""
    student.model.eval()
    velocity, totals = velocities(student, scheduler, source, samples, guidance, seed)
    drawn = draw_all(student, draw, prompts, seed) if draw is not None and prompts else {}
    evaluation = Evaluation(
        mechanism=student.handle.layers[0].mechanism.to_dict(),
        samples=samples,
        prompts=len(prompts),
        velocity=velocity,
        velocity_error=totals,
        attention_error=attention_errors(student, scheduler, source, samples, guidance, seed),
        attention_share=operations(student) / operations(student, SoftmaxAttention()),
        pictures=compare(drawn) if drawn else None,
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


def velocities(
    student: Student, scheduler: Any, source: Source, count: int, guidance: float | None, seed: int
) -> tuple[tuple[Velocity, ...], dict[str, float]]:
    """The errors at each level, and over all of them."""
    rows: list[Velocity] = []
    power, errors = 0.0, {"student": 0.0, "swap alone": 0.0}
    device = next(student.model.parameters()).device
    for level in LEVELS:
        batch = held_out_batch(source, count, level, seed).to(device)
        noised = add_noise(scheduler, batch)
        found: dict[str, Tensor] = {}
        for which in MODELS:
            with as_model(student, which):
                found[which] = predict(student.model, noised, batch.conditioning, guidance).float()
        own = float(found["teacher"].square().mean())
        squared = {which: float((found[which] - found["teacher"]).square().mean()) for which in errors}
        rows.append(Velocity(float(noised.level[0]), squared["student"] / own, squared["swap alone"] / own))
        power += own
        errors = {which: errors[which] + squared[which] for which in errors}
    return tuple(rows), {which: error / power for which, error in errors.items()}


def attention_errors(
    student: Student, scheduler: Any, source: Source, count: int, guidance: float | None, seed: int
) -> dict[str, float]:
    """How far each swapped layer's output lies from the teacher's, half-way through the noise levels."""
    device = next(student.model.parameters()).device
    batch = held_out_batch(source, count, 0.5, seed).to(device)
    noised = add_noise(scheduler, batch)
    names = [layer.name for layer in student.handle.layers]
    capture, outputs = Capture(student.model, names), []
    for which in ("teacher", "student"):
        with as_model(student, which), capture:
            predict(student.model, noised, batch.conditioning, guidance)
        outputs.append([output.float() for output in capture.outputs])
    pairs = zip(names, *outputs, strict=True)
    return {name: float((own - wanted).square().mean() / wanted.square().mean()) for name, wanted, own in pairs}


def draw_all(
    student: Student, draw: Callable[[str, int], np.ndarray], prompts: Sequence[str], seed: int
) -> dict[str, list[np.ndarray]]:
    """Every prompt by every model, from the same noise."""
    drawn: dict[str, list[np.ndarray]] = {}
    for which in MODELS:
        with as_model(student, which):
            drawn[which] = [draw(prompt, seed + number) for number, prompt in enumerate(prompts)]
    return drawn


def compare(drawn: dict[str, list[np.ndarray]]) -> Pictures:
    """PSNR and SSIM of the student's pictures, and of the swap's, to the teacher's."""
    others = [which for which in MODELS if which != "teacher"]

    def mean(metric: Callable[[Any, Any], float], which: str) -> float:
        pairs = zip(drawn[which], drawn["teacher"], strict=True)
        return float(np.mean([min(metric(as_pixels(own), as_pixels(wanted)), 99.0) for own, wanted in pairs]))

    try:
        similar = {which: mean(ssim, which) for which in others}
    except ImportError:
        similar = None
    return Pictures({which: mean(psnr, which) for which in others}, similar)


def markdown(evaluation: Evaluation) -> str:
    """The figures as a page."""
    lines = [
        f"Velocity error relative to the teacher's power, {evaluation.samples} held-out samples:",
        "",
        "| noise | student | swap alone | ratio |",
        "|---:|---:|---:|---:|",
    ]
    rows = [(f"{row.level:.2f}", row.student, row.swap_alone) for row in evaluation.velocity]
    rows.append(("all", evaluation.velocity_error["student"], evaluation.velocity_error["swap alone"]))
    lines += [f"| {name} | {own:.5f} | {swap:.5f} | {swap / own:.1f} |" for name, own, swap in rows]
    lines += ["", f"Attention computed: {evaluation.attention_share:.1%} of full attention."]
    if evaluation.pictures is not None:
        names = ("student", "swap alone")
        found = ", ".join(f"{which} {evaluation.pictures.psnr[which]:.2f} dB" for which in names)
        lines += ["", f"PSNR to the teacher's pictures, {evaluation.prompts} prompts: {found}."]
    return "\n".join(lines) + "\n"


def page(drawn: dict[str, list[np.ndarray]], prompts: Sequence[str], limit: int = 8) -> Image.Image:
    """Teacher, student and swap alone side by side, one prompt a row."""
    rows = [[Entry(Image.fromarray(drawn[which][row])) for which in MODELS] for row in range(min(limit, len(prompts)))]
    return sheet(rows, prompts[:limit], MODELS)


def save(
    evaluation: Evaluation, drawn: dict[str, list[np.ndarray]], prompts: Sequence[str], folder: Path
) -> list[Path]:
    """Write `evaluation.json`, `evaluation.md`, and `sheet.png` where pictures were drawn."""
    paths = [
        write_json(folder / "evaluation.json", asdict(evaluation)),
        write_text(folder / "evaluation.md", markdown(evaluation)),
    ]
    if drawn:
        with written(folder / "sheet.png") as temporary:
            page(drawn, prompts).save(temporary)
        paths.append(folder / "sheet.png")
    return paths
