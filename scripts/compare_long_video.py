"""Long videos of the bundled model under several settings of dual-scope attention, beside one pass of full attention.

    python scripts/compare_long_video.py --output runs                       every row; goes on where it was ended
    python scripts/compare_long_video.py --output runs --only full --only memory --count 2
    python scripts/compare_long_video.py --output runs --count 4 --table     the table of what is there, nothing made
    python scripts/compare_long_video.py --output runs --table --strip strip.png --strip-of 2

The prompts name neither colour nor shape, so nothing but the video itself can keep them; `diffattn.tiny.track` judges,
and `diffattn.measure.lasting`. Each video's figures are in `--output` as soon as it is made, with its frames.
"""

import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from diffattn.pipelines.long_video import LongVideoConfig, LongVideoPipeline, PromptRange
from diffattn.pipelines.long_video.loading import open_parts
from diffattn.pipelines.long_video.run.run import native_settings
from PIL import Image

from diffattn.files.writing import written
from diffattn.measure.lasting import drift, loop, own_flicker
from diffattn.mechanisms.dual_scope import EARLY, LATE
from diffattn.parallel import FramePlan
from diffattn.tiny.moving import FRAMES, MOTIONS, MOVING_COLOURS
from diffattn.tiny.track import Figures, figures, follow

WHOLE: dict[str, Any] = {"top_k": 0}
APART = "apart"
ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "full": ("one pass of full attention", WHOLE),
    "own": ("dual-scope attention", {}),
    "memory": ("memory 8", {"memory": 8}),
    "content": ("chosen by content", {"chosen_by": "content"}),
    "scaled": ("logits by frames seen", {"token_num_scale": True}),
    "scaled-few": ("8 global frames, logits by frames seen", {"top_k": 8, "token_num_scale": True}),
    "early": ("global frames +2 early", {"global_phase": (800, 0.0, 2.0)}),
    "rotation": ("rotation 1", {"rotation": 1.0}),
    "forget": ("memory 8, forget 0.05", {"memory": 8, "forget": 0.05}),
    "few": ("8 global frames", {"top_k": 8}),
    "few-memory": ("8 global frames, memory 16", {"top_k": 8, "memory": 16}),
    "always": ("global frames +2 always", {"global_phase": (None, 0.0, 2.0)}),
    "released": ("released: padding 8, 16 frames, 10 early and late", {
        "padding": 8, "top_k": 16, "local_phase": LATE, "global_phase": EARLY}),
    APART: ("clips apart", {}),
}  # fmt: skip
"""Short name -> name in the table, and what differs from the command's settings for the bundled model."""
COLUMNS = {
    "identity": "identity", "flicker": "flicker", "loop": "loop", "drift": "drift",
    "seam_acceleration": "at seams, px", "acceleration": "elsewhere, px",
    "within": "in clips", "clean": "clean",
}  # fmt: skip
app = typer.Typer(rich_markup_mode=None)


def prompts(count: int) -> Iterator[str]:
    """Every background, with one motion and then the other."""
    texts = [f"a shape moving {motion} on a {ground} background" for motion in MOTIONS for ground in MOVING_COLOURS]
    yield from (texts[i % len(texts)] for i in range(count))


def render(parts: Any, text: str, frames: int, seed: int, **options: Any) -> np.ndarray:
    """One call of the pipeline with the command's settings for the bundled model: uint8 (frames, SIDE, SIDE, 3)."""
    settings = native_settings("tiny") | options
    config = LongVideoConfig(prompts=(PromptRange(0, frames, text),), frames=frames, seed=seed, **settings)
    pipe = LongVideoPipeline(parts, FramePlan((frames,)))
    return np.stack(list(pipe.decode(pipe(config))))


def make(parts: Any, name: str, text: str, frames: int, seed: int, steps: int | None) -> np.ndarray:
    """The video of one row and prompt."""
    more = {} if steps is None else {"steps": steps}
    if name == APART:
        seeds = [1000 * (seed + 1) + i for i in range(frames // FRAMES)]
        clips = [render(parts, text, FRAMES, own, padding=FRAMES - 1, **WHOLE, **more) for own in seeds]
        return np.concatenate(clips)
    options = ROWS[name][1] | more
    return render(parts, text, frames, seed, **options, **({"padding": frames - 1} if name == "full" else {}))


def within_clips(video: np.ndarray) -> list[Figures]:
    """Each stretch of native length by itself: its quality, whatever becomes of the whole."""
    return [figures(follow(video[i : i + FRAMES])) for i in range(0, len(video), FRAMES)]


def measure(video: np.ndarray) -> dict[str, float]:
    """Everything that a row says of one video."""
    whole = figures(follow(video), seams=range(FRAMES, len(video), FRAMES))
    inside = within_clips(video)
    return {
        **dataclasses.asdict(whole),
        "flicker": own_flicker(video),
        "loop": loop(video, FRAMES),
        "drift": drift(video, FRAMES),
        "within": float(np.mean([found.identity for found in inside])),
        "clean": float(np.mean([found.clean for found in inside])),
    }


def row(name: str, measured: list[dict[str, float]]) -> str:
    """A line of the table: means over videos."""
    digits = {"flicker": 3, "drift": 3}
    cells = [f"{np.nanmean([one[key] for one in measured]):.{digits.get(key, 2)}f}" for key in COLUMNS]
    return f"| {name} | {len(measured)} | {' | '.join(cells)} |"


def table(kept: Mapping[str, list[dict[str, Any]]], frames: int) -> str:
    """Markdown, of all rows that have a video."""
    lines = [f"| {frames} frames | prompts | {' | '.join(COLUMNS.values())} |", "|---|---|" + "---|" * len(COLUMNS)]
    return "\n".join([*lines, *(row(ROWS[name][0], found) for name, found in kept.items() if found)])


def write_strip(videos: list[np.ndarray], file: Path, every: int) -> None:
    """One row a video, of every so many frames."""
    rows = [np.pad(np.concatenate(list(video[::every]), axis=1), ((0, 3), (0, 0), (0, 0))) for video in videos]
    Image.fromarray(np.concatenate(rows)).save(file)


def place(output: Path, number: int, name: str) -> Path:
    """Where the figures of a video are; its frames lie beside, as .npz."""
    return output / f"{number:02d}-{name}.json"


def read(file: Path, about: Mapping[str, Any]) -> dict[str, Any] | None:
    """What an earlier run measured; None where there is nothing. Raises where it was of other settings."""
    if not file.exists():
        return None
    found: dict[str, Any] = json.loads(file.read_text())
    other = [key for key, value in json.loads(json.dumps(about)).items() if found["about"].get(key) != value]
    if other:
        raise typer.BadParameter(f"{file} is of another {', '.join(other)}; give another --output, or remove it")
    return found["figures"]


def keep(file: Path, video: np.ndarray, about: Mapping[str, Any]) -> dict[str, float]:
    """Measure a video and write both."""
    found = measure(video)
    with written(file.with_suffix(".npz")) as part:
        np.savez_compressed(part, video=video)
    with written(file) as part:
        part.write_text(json.dumps({"about": about, "figures": found}, indent=1))
    return found


@app.command()
def main(
    output: Annotated[Path, typer.Option(help="Folder of what is made, read again by the next run.")],
    frames: Annotated[int, typer.Option(help="Of each video, a multiple of 16.")] = 128,
    count: Annotated[int, typer.Option(help="Prompts.")] = 4,
    seed: Annotated[int, typer.Option(help="Of the first prompt; the next ones follow.")] = 0,
    steps: Annotated[int | None, typer.Option(help="Denoising steps. Default: the model's own.")] = None,
    only: Annotated[list[str] | None, typer.Option(help=f"Rows: {', '.join(ROWS)}. Default: all.")] = None,
    model: Annotated[str, typer.Option(help="tiny, or the folder of a pipeline like it.")] = "tiny",
    only_table: Annotated[bool, typer.Option("--table", help="Make nothing, print what is there.")] = False,
    strip: Annotated[Path | None, typer.Option(help="PNG of one prompt's videos, a row each.")] = None,
    strip_of: Annotated[int, typer.Option(help="Number of that prompt.")] = 0,
) -> None:
    """Make the videos that are missing, prompt by prompt, and print the table in Markdown."""
    if frames % FRAMES or frames < 2 * FRAMES:
        raise typer.BadParameter(f"expected a multiple of {FRAMES} from {2 * FRAMES}; got {frames}")
    names = only or list(ROWS)
    if unknown := sorted(set(names) - set(ROWS)):
        raise typer.BadParameter(f"expected rows of {', '.join(ROWS)}; got {', '.join(unknown)}")
    kept: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    parts = None
    for number, text in enumerate(prompts(count)):
        for name in names:
            about = {"row": name, "options": ROWS[name][1], "prompt": text, "frames": frames, "seed": seed + number,
                     "steps": steps, "model": model}  # fmt: skip
            file = place(output, number, name)
            found = read(file, about)
            if found is None and not only_table:
                parts = parts or open_parts(model, None, torch.float32, torch.device("cpu"))
                found = keep(file, make(parts, name, text, frames, seed + number, steps), about)
                typer.echo(f"{file}: identity {found['identity']:.2f}", err=True)
            if found is not None:
                kept[name].append(found)
    typer.echo(table(kept, frames))
    if strip is not None:
        files = [place(output, strip_of, name).with_suffix(".npz") for name in names]
        write_strip([np.load(file)["video"] for file in files if file.exists()], strip, frames // FRAMES // 2)


if __name__ == "__main__":
    app()
