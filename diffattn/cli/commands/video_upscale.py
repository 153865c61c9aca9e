"""The command `diffattn video-upscale`: a video restored and enlarged by STAR."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from ..around.leaving import leaving_record, video_sizes
from ..frame import Device, Dtype, Overwrite, Seed, Threads, app, complain, cpu_threads, examples, output_option, quiet
from ..groups import Group, taken
from ..videos import bar, once

MODEL = "--checkpoint star"
MEMORY = "Memory"
FAILED = 1


@app.command(
    "video-upscale",
    epilog=examples(
        f"diffattn video-upscale old.mp4 {MODEL} --output new.mp4",
        f"diffattn video-upscale old.mp4 {MODEL} --scale 2 --prompt 'boats in a harbour' --frames 48 --output look.mp4",
        f"diffattn video-upscale old.mp4 {MODEL} --tile 768 --decode-tile 768 --decode-chunk 4 --offload "
        "--output new.mp4",
        f"diffattn video-upscale old.mp4 {MODEL} --output new.mp4 --resume",
    ),
    groups=[
        Group("diffattn.pipelines.video_sr.i2vgenxl.settings:UpscaleSettings", also=["seed"], only_given=True),
        Group("diffattn.media.clip:Clip", without=["skip"], only_given=True),
    ],
    files=["config", "like"],
)
def video_upscale(
    context: typer.Context,
    source: Annotated[Path, typer.Argument(metavar="IN", help="Video, or folder of its frames.")],
    checkpoint: Annotated[Path, typer.Option(help="Folder of the converted STAR checkpoint, I2VGen-XL variant.")],
    output: Annotated[Path, output_option("Video, .mp4, .mov or .mkv; with the input's sound.")],
    scale: Annotated[float, typer.Option(help="Factor of both sides, from 1.")] = 4.0,
    prompt: Annotated[str, typer.Option(help="What the video shows; a quality prompt follows.")] = "a good video",
    negative_prompt: Annotated[
        str | None, typer.Option(help="What it is not to look like. Default: blur, noise, compression and the like.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue a run that was stopped, from its folder OUTPUT.work.")
    ] = False,
    overwrite: Overwrite = False,
    offload: Annotated[
        bool,
        typer.Option("--offload", help="Keep on the GPU only what computes at the moment.", rich_help_panel=MEMORY),
    ] = False,
    force: Annotated[
        bool,
        typer.Option("--force", help="Begin even if memory or disk seem too small.", rich_help_panel=MEMORY),
    ] = False,
    threads: Threads = None,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Restore and enlarge a video by STAR.

    The result has the frames, the rate and the sound of the input, the right way up; an odd side gets its last row or
    column twice. What the run needs of memory and disk is told before it begins. A stopped run continues with --resume.

    The exit code is 1 where the run fails on the way, 2 where it cannot begin.
    """
    from diffattn.files.records import check_record, path_beside

    with quiet():  # diffusers and transformers speak of missing extras when they are imported
        import diffattn.pipelines.video_sr.run.upscaling as star
        from diffattn.media.clip import Clip

    from ..arguments import parse_device, parse_dtype

    where = parse_device(device)
    number = parse_dtype(dtype, where)
    if offload and where.type == "cpu":
        raise ValueError("--offload moves parts to a GPU and back, and this is --device cpu: leave --offload out")
    upscaling = star.Upscaling(
        clip=Clip(path=source, **taken(context, "Clip")),
        checkpoint=checkpoint,
        output=output,
        scale=scale,
        prompt=prompt,
        negative_prompt=negative_prompt,
        resume=resume,
        overwrite=overwrite,
        settings=star.UpscaleSettings(**fitting(taken(context, "UpscaleSettings"))),
    )
    check_record(path_beside(output), overwrite=overwrite)
    room: dict[str, Any] = {"offload": offload, "force": force}
    with (
        cpu_threads(threads),
        quiet(),
        once(),
        upscaling.prepared(where, number, **room, progress=bar, tell=tell) as run,
    ):
        run.pipe.set_progress_bar_config(disable=True)
        try:
            with leaving_record(context, path_beside(output), device, dtype) as made:
                run.make()
                made |= video_sizes(output)
        except (ValueError, OSError, MemoryError, RuntimeError) as error:
            complain(RuntimeError(f"{error or 'out of memory'}; what is done is kept: continue with --resume"))
            raise typer.Exit(FAILED) from error
    typer.echo(str(output))


def tell(text: str) -> None:
    """A line that leaves progress bars whole."""
    from tqdm import tqdm

    tqdm.write(f"diffattn: {text}", file=sys.stderr)


def fitting(given: dict[str, Any]) -> dict[str, Any]:
    """The settings that were typed, with overlaps that fit windows and chunks of other lengths than the default."""
    if "window" in given:
        given.setdefault("overlap", given["window"] // 2)
    if "decode_chunk" in given:
        given.setdefault("decode_overlap", min(2, given["decode_chunk"] - 1))
    return given
