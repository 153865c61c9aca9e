"""Lines of a comparison as Markdown, JSON and a plot."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import typer

from diffattn.files.writing import write_json, write_text, written
from diffattn.measure import hardware, hardware_line
from diffattn.media.drawing import figure_class


@dataclass(frozen=True)
class Line:
    """What one method came to."""

    name: str
    share: float
    values: tuple[float, ...]
    """PSNR in dB of each image, or a relative error of each call."""

    @property
    def decibels(self) -> str:
        values = np.array(self.values)
        return (
            f"| {self.name} | {self.share:.3f} | {np.median(values):.1f} | {values.mean():.1f} | {values.min():.1f}-"
            f"{values.max():.1f} |"
        )

    @property
    def error(self) -> str:
        return f"| {self.name} | {self.share:.3f} | {np.mean(self.values):.4f} | {max(self.values):.4f} |"


def decibels(lines: Sequence[Line], base: str) -> list[str]:
    """PSNR of each method, and its gain over the method `base`, image by image."""
    text = ["| | share | median | mean | min-max |", "|---|---:|---:|---:|---:|", *(line.decibels for line in lines)]
    text += ["", f"| gain over {base} | mean | median | worst |", "|---|---:|---:|---:|"]
    first = np.array(next(line.values for line in lines if line.name == base))
    for line in lines:
        gain = np.array(line.values) - first
        text.append(f"| {line.name} | {gain.mean():+.1f} | {np.median(gain):+.1f} | {gain.min():+.1f} |")
    return text


def errors(lines: Sequence[Line]) -> list[str]:
    """Relative errors of each method."""
    return ["| | share | mean error | worst |", "|---|---:|---:|---:|", *(line.error for line in lines)]


def save(lines: Sequence[Line], name: str, title: str, text: Sequence[str], output: Path, unit: str) -> None:
    """`name`.md with `text`, `name`.json with every value, `name`.png with their spread."""
    document = "\n".join([f"{title}; {hardware_line(hardware())}", "", *text]) + "\n"
    write_text(output / f"{name}.md", document)
    content = {"title": title, "unit": unit, "machine": hardware(), "lines": [asdict(line) for line in lines]}
    write_json(output / f"{name}.json", content)
    figure = figure_class()(figsize=(9, 0.4 * len(lines) + 1.5), layout="constrained", dpi=110)
    axes = figure.subplots()
    axes.boxplot([line.values for line in lines], orientation="horizontal", whis=(0, 100))
    axes.set_yticks(range(1, len(lines) + 1), [f"{line.name}, {line.share:.0%}" for line in lines])
    axes.invert_yaxis()
    axes.set_xlabel(unit)
    axes.set_title(title)
    with written(output / f"{name}.png") as path:
        figure.savefig(path)
    typer.echo(document)
