"""The command `python -m diffattn.pipelines.long_video`, alone or under torchrun.

Wrong input ends with code 2 and one line on every rank, before the first step; a run that fails on the way with 1.
"""

import logging
import os
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.markup import escape

WRONG_INPUT, FAILED, INTERRUPTED = 2, 1, 130
LINGER = 3.0
"""Seconds that a rank stays after its error: torchrun ends the others when it goes, and they have a line to say too."""
NAME = "python -m diffattn.pipelines.long_video"
COMMON = "Every command takes"
WINDOW = "Attention along the frames"
EXAMPLES = (
    f"{NAME} --prompt 'a red circle moving sideways on a blue background' --output out.mp4",
    "torchrun --nproc-per-node 8 -m diffattn.pipelines.long_video --model videocrafter2 \\",
    "    --prompts story.json --frames 480 --output out.mp4",
    "torchrun --nproc-per-node 4 -m diffattn.pipelines.long_video --config multi_promts.json --output out.mp4 --resume",
)

app = typer.Typer(rich_markup_mode="rich", add_completion=False, pretty_exceptions_enable=False)


def _examples() -> str:
    return "\n\n".join(["[bold]Examples[/bold]", *(f"  [cyan]{escape(line)}[/cyan]" for line in EXAMPLES)])


@app.command(epilog=_examples())
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
    """Make a long video by a text-to-video model, its frames shared out among the ranks of torchrun."""
    from .official import read_settings
    from .ranks import Ranks
    from .run import Request, run

    given: dict[str, Any] = {
        "model": model,
        "unet": unet,
        "negative_prompt": negative_prompt,
        "frames": frames,
        "steps": steps,
    }
    given |= {"guidance": guidance, "height": height, "width": width, "fps": fps, "model_fps": model_fps}
    given |= {"blend": blend, "scheduler": scheduler, "padding": padding, "top_k": top_k, "mode": mode, "seed": seed}
    options = {name: value for name, value in given.items() if value is not None}
    where, number = parse_device(device), parse_dtype(dtype, device)
    if prompt is not None and prompts is not None:
        raise ValueError("--prompt and --prompts exclude each other: the prompt file has all prompts")
    ranks = Ranks.start(where, timeout)
    try:
        logging.getLogger("diffattn.long_video").setLevel(logging.WARNING if ranks.rank == 0 else logging.ERROR)

        def request() -> Request:
            settings = {} if config is None else read_settings(config)
            settings |= options | ({} if lengths is None else {"lengths": parse_lengths(lengths)})
            return Request(settings, output, prompt, prompts, work, save_every, resume, keep)

        run(ranks.together(request), ranks, where, number, timeout, progress=True)
        if ranks.rank == 0:
            typer.echo(f"wrote {output}")
    finally:
        if sys.exc_info()[0] is None:
            ranks.close()


def parse_lengths(text: str) -> tuple[int, ...]:
    """`100,60` as numbers of frames."""
    if not all(part.strip().isdecimal() for part in text.split(",")):
        raise ValueError(f"--lengths must be numbers of frames with commas between, such as 100,60, got {text!r}")
    return tuple(int(part) for part in text.split(","))


def parse_device(text: str) -> Any:
    """This rank's device: with torchrun, each of a machine's ranks has a GPU of its own."""
    import torch

    if text not in ("cpu", "cuda", "auto"):
        raise ValueError(f"--device must be cpu, cuda or auto, got {text!r}")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if text == "cpu" or (text == "auto" and count == 0):
        return torch.device("cpu")
    local, wanted = int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if count < wanted:
        raise ValueError(
            f"{wanted} ranks on this machine need as many GPUs, this torch sees {count}; start fewer ranks"
        )
    torch.cuda.set_device(local)
    return torch.device("cuda", local)


def parse_dtype(text: str, device: str) -> Any:
    """A dtype by its name."""
    import torch

    names: tuple[Literal["float32", "bfloat16", "float16"], ...] = ("float32", "bfloat16", "float16")
    if text == "auto":
        return torch.float16 if device != "cpu" and torch.cuda.is_available() else torch.float32
    if text not in names:
        raise ValueError(f"--dtype must be one of {', '.join(names)} or auto, got {text!r}")
    return getattr(torch, text)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; the exit code."""
    from .run import RunError

    for chatty in ("torchao", "torch.utils._pytree"):
        logging.getLogger(chatty).setLevel(logging.ERROR)
    logging.basicConfig(level=logging.ERROR, format="%(name)s: %(message)s")
    warnings.filterwarnings("ignore", category=FutureWarning)
    try:
        app(list(arguments) if arguments is not None else None, prog_name=NAME, standalone_mode=False)
    except (typer.Abort, KeyboardInterrupt):
        return _complain("interrupted", INTERRUPTED)
    except RunError as error:
        return _complain(str(error), FAILED)
    except Exception as error:
        if hasattr(error, "format_message"):
            return _complain(error.format_message(), WRONG_INPUT)
        if isinstance(error, (ValueError, TypeError, ImportError, OSError, NotImplementedError)):
            return _complain(str(error), WRONG_INPUT)
        raise
    return 0


def _complain(text: str, code: int) -> int:
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    rank = f"rank {os.environ['RANK']}: " if several else ""
    typer.echo(f"diffattn: error: {rank}{' '.join(text.split())}", err=True)
    if several:
        time.sleep(LINGER)
    return code
