"""The command `diffattn long-video`: a text-to-video model, its frames shared out among the processes of torchrun."""

import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from diffattn.errors import CHATTY, INTERRUPTED

from ..frame import App, Overwrite, app, examples, quiet

COMMON = "Every command takes"
WINDOW = "Attention along the frames"
NAME = "python -m diffattn.pipelines.long_video"
MODULE = "-m diffattn.pipelines.long_video"
EXAMPLES = examples(
    "diffattn long-video --prompt 'a red circle moving sideways on a blue background' --output out.mp4",
    f"torchrun --nproc-per-node 8 {MODULE} --model videocrafter2 --prompts story.json --frames 480 --output out.mp4",
    f"torchrun --nproc-per-node 4 {MODULE} --config multi_promts.json --output out.mp4 --resume",
)


@app.command("long-video", epilog=EXAMPLES)
def long_video(
    prompt: Annotated[str | None, typer.Option(help="What to show, in all frames.")] = None,
    prompts: Annotated[
        Path | None, typer.Option(help='Prompt file: [{"frames": [0, 120], "prompt": "..."}, ...].')
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="JSON file of settings: ours, or one of the released Video-Infinity code.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="tiny (bundled), videocrafter2, or folder or hub id of a pipeline with a UNet3D."),
    ] = None,
    unet: Annotated[str | None, typer.Option(help="Folder or hub id of another UNet for it.")] = None,
    negative_prompt: Annotated[str | None, typer.Option(help="What not to show.")] = None,
    frames: Annotated[int | None, typer.Option(help="Of the whole video. Default: the prompt file's, or 48.")] = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps. Default: the bundled model's own, or 30.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Default: the bundled model's own, or 12.")] = None,
    height: Annotated[int | None, typer.Option(help="In pixels. Default: the bundled model's own, or 320.")] = None,
    width: Annotated[int | None, typer.Option(help="In pixels. Default: the bundled model's own, or 512.")] = None,
    fps: Annotated[int | None, typer.Option(help="Frames a second in the file. Default: 8.")] = None,
    model_fps: Annotated[int | None, typer.Option(help="Frame rate that VideoCrafter2 is told. Default: 24.")] = None,
    blend: Annotated[
        int | None, typer.Option(help="Frames in which a prompt goes over into the next; 0: a cut. Default: 16.")
    ] = None,
    scheduler: Annotated[
        str | None, typer.Option(help="own (the model's), dpmsolver++ or sde-dpmsolver++. Default: own.")
    ] = None,
    padding: Annotated[
        int | None, typer.Option(help="Frames of local context on either side.", rich_help_panel=WINDOW)
    ] = None,
    top_k: Annotated[int | None, typer.Option(help="Global frames.", rich_help_panel=WINDOW)] = None,
    mode: Annotated[
        str | None,
        typer.Option(help="clean, or official: what the released code computes; equal clips.", rich_help_panel=WINDOW),
    ] = None,
    lengths: Annotated[
        str | None, typer.Option(help="Frames of each rank, as 100,60. Default: even.", rich_help_panel=WINDOW)
    ] = None,
    work: Annotated[
        Path | None, typer.Option(help="Folder of checkpoints and parts, seen by all ranks. Default: OUTPUT.work.")
    ] = None,
    save_every: Annotated[int, typer.Option(min=0, help="Steps between two checkpoints; 0: none.")] = 5,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the last checkpoint, on any number of ranks.")
    ] = False,
    overwrite: Overwrite = False,
    keep: Annotated[bool, typer.Option("--keep", help="Keep the checkpoints when the video is done.")] = False,
    timeout: Annotated[
        float, typer.Option(min=1.0, help="Seconds without any progress after which all ranks end.")
    ] = 600.0,
    seed: Annotated[
        int | None, typer.Option(help="Of all random numbers: same seed, same video.", rich_help_panel=COMMON)
    ] = None,
    device: Annotated[
        str, typer.Option(help="cpu, cuda (one GPU for each rank), or auto.", rich_help_panel=COMMON)
    ] = "auto",
    dtype: Annotated[
        str,
        typer.Option(
            help="float32, bfloat16, float16, or auto: float16 on a GPU, else float32.", rich_help_panel=COMMON
        ),
    ] = "auto",
    output: Annotated[
        Path, typer.Option(help="Video file (.mp4, .mov, .mkv), or folder for pictures.", rich_help_panel=COMMON)
    ] = Path("outputs/long-video.mp4"),
) -> None:
    """Make a long video by a text-to-video model, its frames shared out among the ranks of torchrun.

    `torchrun ... -m diffattn long-video` and `-m diffattn.pipelines.long_video` are the same. The exit code is 1 where
    the run fails on the way, 2 where it cannot begin.
    """
    with quiet():  # diffusers and transformers speak of missing extras when they are imported
        from diffattn.pipelines.long_video.run.command import Options, execute

    given = {
        "model": model,
        "unet": unet,
        "negative_prompt": negative_prompt,
        "frames": frames,
        "steps": steps,
        "guidance": guidance,
        "height": height,
        "width": width,
        "fps": fps,
        "model_fps": model_fps,
        "blend": blend,
        "scheduler": scheduler,
        "padding": padding,
        "top_k": top_k,
        "mode": mode,
        "seed": seed,
    }
    options = Options(
        settings={name: value for name, value in given.items() if value is not None},
        output=output,
        prompt=prompt,
        prompts=prompts,
        config=config,
        lengths=lengths,
        work=work,
        save_every=save_every,
        resume=resume,
        overwrite=overwrite,
        keep=keep,
        timeout=timeout,
        device=device,
        dtype=dtype,
    )
    code = execute(options)
    if code and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # threads of a broken group may keep the interpreter from ending
    raise typer.Exit(code)


alone = App(rich_markup_mode="rich", add_completion=False, pretty_exceptions_enable=False)
alone.command(epilog=EXAMPLES)(long_video)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command as a module of its own; the exit code. A wrong option is told by every rank, with its number."""
    with quiet():
        from diffattn.pipelines.long_video.run.command import complain, report

    for chatty in CHATTY:
        logging.getLogger(chatty).setLevel(logging.ERROR)
    try:
        code = alone(list(arguments) if arguments is not None else None, prog_name=NAME, standalone_mode=False)
    except (typer.Abort, KeyboardInterrupt):
        return complain("interrupted", INTERRUPTED)
    except Exception as error:
        return report(error)
    return int(code or 0)
