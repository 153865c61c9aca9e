"""Compare what `estimate` predicts for this machine with what a run takes, and write the table into a Markdown file.

    python scripts/numbers/estimated_speed.py docs/tuning.md

`routing` at `quality="balanced"` on the bundled pipelines at several sizes, five steps from noise. What is predicted is
the time of the transformer: hooks take that of its forwards alone. Run it with nothing beside it.
"""

import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from diffusers import FluxPipeline, WanPipeline

from diffattn import apply, estimate, tiny
from diffattn.measure import hardware, hardware_line

MARKERS = "<!-- estimates -->", "<!-- /estimates -->"
STEPS, QUALITY = 5, "balanced"
CASES: list[tuple[str, Any, tuple[int, ...]]] = [
    ("flux", FluxPipeline, (128, 256, 512, 1024)),
    ("wan", WanPipeline, (48, 96, 144)),
]


class Stopwatch:
    """Seconds of a model's forwards."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.seconds = 0.0
        self._begun = 0.0
        model.register_forward_pre_hook(self._begin)
        model.register_forward_hook(self._end)

    def _begin(self, *_: Any) -> None:
        self._begun = time.perf_counter()

    def _end(self, *_: Any) -> None:
        self.seconds += time.perf_counter() - self._begun

    def of(self, pipe: Any, steps: int, call: Mapping[str, Any]) -> float:
        """Of one run."""
        self.seconds = 0.0
        generator = torch.Generator().manual_seed(0)
        pipe("a red circle", generator=generator, output_type="latent", num_inference_steps=steps, **call)
        return self.seconds


def row(pipe: Any, watch: Stopwatch, name: str, call: Mapping[str, Any]) -> str:
    """One size."""
    size = {key: call[key] for key in ("height", "width")}
    size |= {"frames": call["num_frames"]} if "num_frames" in call else {}
    own_call = {**size, "text_tokens": call["max_sequence_length"], "batch": 1, "num_inference_steps": STEPS}
    [found] = estimate(pipe, "routing", quality=QUALITY, **own_call)
    watch.of(pipe, 1, call)
    full, own = [], []
    for _ in range(3 if found.seconds_full < 4 else 1):
        full.append(watch.of(pipe, STEPS, call))
        with apply(pipe, "routing", quality=QUALITY):
            own.append(watch.of(pipe, STEPS, call))
    measured = statistics.median(full) / statistics.median(own)
    pays = "yes" if found.pays else "no"
    what = f"{call['height']} px" + (f", {size['frames']} frames" if "frames" in size else "")
    cells = (f"`tiny:{name}`, {what}", str(found.grid).replace("x", " x "), f"{found.speedup:.2f}x", f"{measured:.2f}x")
    return "| " + " | ".join((*cells, f"{found.speedup / measured - 1:+.0%}", pays)) + " |"


def main(page: Annotated[Path, typer.Argument(help="Markdown file with the markers.")]) -> None:
    """Measure, and write the table."""
    lines = ["| pipeline | tokens | predicted | measured | off by | pays |", "|---|---:|---:|---:|---:|---|"]
    for name, kind, sides in CASES:
        pipe = kind.from_pretrained(tiny.path(name))
        pipe.set_progress_bar_config(disable=True)
        watch = Stopwatch(pipe.transformer)
        options = {key: value for key, value in tiny.defaults(name).items() if key != "num_inference_steps"}
        for side in sides:
            lines.append(row(pipe, watch, name, {**options, "height": side, "width": side}))
            typer.echo(lines[-1])
    lines += ["", hardware_line(hardware())]
    text = page.read_text(encoding="utf-8")
    before, (_, after) = text.partition(MARKERS[0])[0], text.partition(MARKERS[1])[1:]
    page.write_text("\n".join([before + MARKERS[0], *lines, MARKERS[1]]) + after, encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
