"""The command `diffattn long-video`: a text-to-video model, its frames split among the processes of torchrun."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from diffattn.errors import DEBUG, INTERRUPTED
from diffattn.files.records import find_record

from ..around.config_files import take_own_config, take_own_record
from ..around.quiet import set_up
from ..frame import App, Overwrite, Threads, app, examples, quiet
from ..groups import Group, taken

COMMON = "Every command takes"
NAME = "python -m diffattn.pipelines.long_video"
MODULE = "-m diffattn.pipelines.long_video"
EXAMPLES = examples(
    "diffattn long-video --prompt 'a red circle moving sideways on a blue background' --output out.mp4",
    f"torchrun --nproc-per-node 8 {MODULE} --model videocrafter2 --prompts story.json --frames 480 --output out.mp4",
    f"torchrun --nproc-per-node 4 {MODULE} --config multi_promts.json --output out.mp4 --resume",
)


GROUPS = [Group("diffattn.pipelines.long_video.config:LongVideoConfig", only_given=True)]


@app.command("long-video", epilog=EXAMPLES, groups=GROUPS, files=[])
def long_video(
    context: typer.Context,
    prompt: Annotated[str | None, typer.Option(help="What to show, in all frames.")] = None,
    prompts: Annotated[
        Path | None, typer.Option(help='Prompt file: [{"frames": [0, 120], "prompt": "..."}, ...].')
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            is_eager=True,
            callback=take_own_config,
            help="Options from a JSON or TOML file, or from one of the released Video-Infinity code; what is typed "
            "overrides it.",
        ),
    ] = None,
    like: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            is_eager=True,
            callback=take_own_record,
            help="What made a video, from the .json file beside it; --output is not taken from there.",
        ),
    ] = None,
    work: Annotated[
        Path | None, typer.Option(help="Folder of checkpoints and parts, seen by all ranks. Default: OUTPUT.work.")
    ] = None,
    save_every: Annotated[int, typer.Option(min=0, help="Steps between two checkpoints; 0: none.")] = 5,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue from the last checkpoint, on any number of ranks.")
    ] = False,
    overwrite: Overwrite = False,
    keep: Annotated[bool, typer.Option("--keep", help="Keep the checkpoints when the video is done.")] = False,
    timeout: Annotated[
        float, typer.Option(min=1.0, help="Seconds without any progress after which all ranks end.")
    ] = 600.0,
    device: Annotated[
        str, typer.Option(help="cpu, cuda (one GPU for each rank), or auto.", rich_help_panel=COMMON)
    ] = "auto",
    threads: Threads = None,
    dtype: Annotated[
        str,
        typer.Option(
            help="float32, bfloat16, float16, or auto: float16 on a GPU, else float32.", rich_help_panel=COMMON
        ),
    ] = "auto",
    output: Annotated[
        Path, typer.Option(help="Video file (.mp4, .mov, .mkv), or folder for images.", rich_help_panel=COMMON)
    ] = Path("outputs/long-video.mp4"),
) -> None:
    """Make a long video by a text-to-video model, its frames split among the ranks of torchrun.

    `torchrun ... -m diffattn long-video` and `-m diffattn.pipelines.long_video` are the same. The exit code is 1 where
    the run fails on the way, 2 where it cannot begin.
    """
    with quiet():  # diffusers and transformers speak of missing extras when they are imported
        from diffattn.pipelines.long_video.run.command import Options, execute

    options = Options(
        settings=taken(context, "LongVideoConfig"),
        output=output,
        prompt=prompt,
        prompts=prompts,
        config=settings_file(config, like),
        work=work,
        save_every=save_every,
        resume=resume,
        overwrite=overwrite,
        keep=keep,
        timeout=timeout,
        device=device,
        dtype=dtype,
        threads=threads,
    )
    code = execute(options)
    if code and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # threads of a broken group may keep the interpreter from ending
    raise typer.Exit(code)


alone = App(rich_markup_mode="rich", add_completion=False, pretty_exceptions_enable=False)
alone.command("long-video", epilog=EXAMPLES, groups=GROUPS, files=[])(long_video)


def settings_file(config: Path | None, like: Path | None) -> Path | None:
    """The file with the settings of the video."""
    if config is not None and like is not None:
        raise ValueError("--config and --like both say what to make: leave one of them out")
    return config if like is None else find_record(like)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command as a module of its own; the exit code. A wrong option is told by every rank, with its number."""
    set_up(bool(os.environ.get(DEBUG)))
    with quiet():
        from diffattn.pipelines.long_video.run.command import complain, report

    try:
        code = alone(list(arguments) if arguments is not None else None, prog_name=NAME, standalone_mode=False)
    except (typer.Abort, KeyboardInterrupt):
        return complain("interrupted", INTERRUPTED)
    except Exception as error:
        return report(error)
    return int(code or 0)
