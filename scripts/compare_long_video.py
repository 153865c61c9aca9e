"""One long video three ways on the bundled model: dual-scope attention, clips apart, and one pass of full attention.

    python scripts/compare_long_video.py
    python scripts/compare_long_video.py --frames 64 --strip strip.png --strip-of 2

The prompts name neither colour nor shape, so nothing but the video itself can keep them; `diffattn.tiny.track` judges.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from diffattn.pipelines.long_video import LongVideoConfig, LongVideoPipeline, PromptRange
from diffattn.pipelines.long_video.loading import open_parts
from diffattn.pipelines.long_video.run.run import native_settings
from PIL import Image

from diffattn.parallel import FramePlan
from diffattn.tiny.moving import FRAMES, MOTIONS, MOVING_COLOURS
from diffattn.tiny.track import Figures, figures, follow

NAMES = ("dual-scope attention", "clips apart", "one pass of full attention")
WHOLE: dict[str, Any] = {"top_k": 0}
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


def three_ways(parts: Any, text: str, frames: int, seed: int) -> list[np.ndarray]:
    """The videos in the order of NAMES."""
    clips = [
        render(parts, text, FRAMES, 1000 * (seed + 1) + i, padding=FRAMES - 1, **WHOLE) for i in range(frames // FRAMES)
    ]
    return [
        render(parts, text, frames, seed),
        np.concatenate(clips),
        render(parts, text, frames, seed, padding=frames - 1, **WHOLE),
    ]


def within_clips(video: np.ndarray) -> list[Figures]:
    """Each stretch of native length by itself: its quality, whatever becomes of the whole."""
    return [figures(follow(video[i : i + FRAMES])) for i in range(0, len(video), FRAMES)]


def row(name: str, videos: list[np.ndarray]) -> str:
    """A line of the table: means over videos."""
    seams = range(FRAMES, len(videos[0]), FRAMES)
    whole = [figures(follow(video), seams=seams) for video in videos]
    inside = [found for video in videos for found in within_clips(video)]
    values = (
        np.mean([found.identity for found in whole]),
        np.nanmean([found.seam_acceleration for found in whole]),
        np.nanmean([found.acceleration for found in whole]),
        np.mean([found.identity for found in inside]),
        np.mean([found.clean for found in inside]),
    )
    return f"| {name} | {values[0]:.2f} | {values[1]:.2f} | {values[2]:.2f} | {values[3]:.2f} | {values[4]:.2f} |"


def write_strip(videos: list[np.ndarray], file: Path, every: int) -> None:
    """One row a video, of every so many frames."""
    rows = [np.pad(np.concatenate(list(video[::every]), axis=1), ((0, 3), (0, 0), (0, 0))) for video in videos]
    Image.fromarray(np.concatenate(rows)).save(file)


@app.command()
def main(
    frames: Annotated[int, typer.Option(help="Of each video, a multiple of 16.")] = 128,
    count: Annotated[int, typer.Option(help="Prompts.")] = 5,
    seed: Annotated[int, typer.Option(help="Of the first prompt; the next ones follow.")] = 0,
    model: Annotated[str, typer.Option(help="tiny, or the folder of a pipeline like it.")] = "tiny",
    strip: Annotated[Path | None, typer.Option(help="PNG of one prompt's three videos.")] = None,
    strip_of: Annotated[int, typer.Option(help="Number of that prompt.")] = 0,
) -> None:
    """Print the table in Markdown."""
    if frames % FRAMES or frames < 2 * FRAMES:
        raise typer.BadParameter(f"expected a multiple of {FRAMES} from {2 * FRAMES}; got {frames}")
    parts = open_parts(model, None, torch.float32, torch.device("cpu"))
    videos: list[list[np.ndarray]] = []
    for number, text in enumerate(prompts(count)):
        videos.append(three_ways(parts, text, frames, seed + number))
        if strip is not None and number == strip_of:
            write_strip(videos[-1], strip, frames // FRAMES // 2)
    typer.echo(f"| {frames} frames, {count} prompts | identity | at seams, px | elsewhere, px | in clips | clean |")
    typer.echo("|---|---|---|---|---|---|")
    for name, same in zip(NAMES, zip(*videos, strict=True), strict=True):
        typer.echo(row(name, list(same)))


if __name__ == "__main__":
    app()
