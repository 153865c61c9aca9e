"""An evaluation as files: evaluation.json, evaluation.md and, where images were drawn, sheet.png."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
from PIL import Image

from diffattn.files.writing import write_json, write_text, written
from diffattn.measure import hardware_line
from diffattn.media.drawing import Entry, sheet

from .evaluate import MODELS, Evaluation, Pictures, Speed
from .picture_metrics import TITLES


def save(
    evaluation: Evaluation, drawn: dict[str, list[np.ndarray]], prompts: Sequence[str], folder: Path
) -> list[Path]:
    """Write `evaluation.json`, `evaluation.md`, and `sheet.png` where images were drawn."""
    paths = [
        write_json(folder / "evaluation.json", asdict(evaluation)),
        write_text(folder / "evaluation.md", markdown(evaluation)),
    ]
    if drawn:
        with written(folder / "sheet.png") as temporary:
            page(drawn, prompts).save(temporary)
        paths.append(folder / "sheet.png")
    return paths


def markdown(evaluation: Evaluation) -> str:
    """The figures as a page."""
    parts = [_velocity(evaluation), _attention(evaluation)]
    if evaluation.speed is not None:
        parts.append(_speed(evaluation.speed))
    if evaluation.pictures is not None:
        parts.append(_pictures(evaluation.pictures, evaluation.prompts))
    return "\n\n".join("\n".join(part) for part in parts) + "\n"


def page(drawn: dict[str, list[np.ndarray]], prompts: Sequence[str], limit: int = 8) -> Image.Image:
    """Teacher, student and swap alone side by side, one prompt a row."""
    rows = [[Entry(_shown(drawn[which][row])) for which in MODELS] for row in range(min(limit, len(prompts)))]
    return sheet(rows, prompts[:limit], MODELS)


def _shown(picture: np.ndarray) -> Image.Image:
    """An image; of a clip four frames from the first to the last, in two rows."""
    if picture.ndim == 3:
        return Image.fromarray(picture)
    frames = picture[np.linspace(0, len(picture) - 1, 4).round().astype(int)]
    return Image.fromarray(np.concatenate([np.concatenate(list(row), axis=1) for row in (frames[:2], frames[2:])]))


def _velocity(evaluation: Evaluation) -> list[str]:
    rows = [(f"{row.level:.2f}", row.student, row.swap_alone) for row in evaluation.velocity]
    rows.append(("all", evaluation.velocity_error["student"], evaluation.velocity_error["swap alone"]))
    return [
        f"Velocity error relative to the teacher's power, {evaluation.samples} held-out samples:",
        "",
        "| noise | student | swap alone | ratio |",
        "|---:|---:|---:|---:|",
        *(f"| {name} | {own:.5f} | {swap:.5f} | {_ratio(swap, own)} |" for name, own, swap in rows),
    ]


def _attention(evaluation: Evaluation) -> list[str]:
    """Error and operations of every layer."""
    full, own = evaluation.operations["teacher"], evaluation.operations["student"]
    rows = [(one.name, one.grid, f"{one.error:.5f}", one.operations, one.full) for one in evaluation.layers]
    rows.append(("all", "", "", own, full))
    return [
        f"Attention computed: {evaluation.attention_share:.1%} of full attention. Operations in a forward of one "
        f"sample, and the error of every layer's output relative to the teacher's power:",
        "",
        "| layer | tokens | error | operations | full attention | share |",
        "|---|---|---:|---:|---:|---:|",
        *(
            f"| {name} | {grid} | {error} | {computed:.3e} | {whole:.3e} | {computed / whole:.1%} |"
            for name, grid, error, computed, whole in rows
        ),
    ]


def _speed(speed: Speed) -> list[str]:
    teacher = speed.seconds["teacher"]["median_s"]
    rows = []
    for which, timing in speed.seconds.items():
        first, third = (1e3 * value for value in timing["quartiles_s"])
        median = timing["median_s"]
        rows.append(
            f"| {which} | {1e3 * median:.2f} ms | {first:.2f} - {third:.2f} ms | {_ratio(teacher, median, 2)} |"
        )
    return [
        f"Time of a forward, one sample with latents {' x '.join(map(str, speed.size))}, {speed.rounds} rounds in "
        f"turn; {hardware_line(speed.machine)}:",
        "",
        "| model | median | quartiles | speedup |",
        "|---|---:|---:|---:|",
        *rows,
    ]


def _pictures(pictures: Pictures, prompts: int) -> list[str]:
    rows = [("PSNR to the teacher's, dB", pictures.psnr)]
    if pictures.ssim is not None:
        rows.append(("SSIM to the teacher's", pictures.ssim))
    rows += [(TITLES.get(name, name), values) for name, values in pictures.metrics.items()]
    return [
        f"Images of {prompts} prompts:" if pictures.frames == 1 else f"Clips of {prompts} prompts, means over frames:",
        "",
        f"| | {' | '.join(MODELS)} |",
        f"|---|{'---:|' * len(MODELS)}",
        *(
            f"| {title} | {' | '.join(f'{values[which]:.4g}' if which in values else '' for which in MODELS)} |"
            for title, values in rows
        ),
    ]


def _ratio(above: float, below: float, digits: int = 1) -> str:
    return f"{above / below:.{digits}f}" if below else "-"
