"""What `diffattn long-video` does, alone or under torchrun; `python -m diffattn.pipelines.long_video` is the same.

Wrong input ends with code 2 and one line on every rank, before the first step; a run that fails on the way with 1.
"""

import logging
import os
import sys
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import typer

from diffattn.errors import DEBUG, INTERRUPTED, WRONG_INPUT, is_expected

from ..official import read_settings
from .ranks import Ranks
from .run import Request, RunError, run

FAILED = 1
LINGER = 3.0
"""Seconds that a rank stays after its error: torchrun ends the others when it goes, and they have a line to say too."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """What was typed."""

    settings: dict[str, Any]
    """Fields of `LongVideoConfig`; they go over those of the file `config`."""
    output: Path
    prompt: str | None = None
    prompts: Path | None = None
    config: Path | None = None
    work: Path | None = None
    save_every: int = 5
    resume: bool = False
    overwrite: bool = False
    keep: bool = False
    timeout: float = 600.0
    device: str = "auto"
    dtype: str = "auto"
    threads: int | None = None

    def request(self) -> Request:
        """What is to be made, with the settings of the file; raises `ValueError` for what cannot be read."""
        settings = {} if self.config is None else read_settings(self.config)
        settings |= self.settings
        return Request(
            settings=settings,
            output=self.output,
            prompt=self.prompt,
            prompts=self.prompts,
            work=self.work,
            save_every=self.save_every,
            resume=self.resume,
            keep=self.keep,
            overwrite=self.overwrite,
        )


def execute(options: Options) -> int:
    """Make the video, or say in one line why not; the exit code."""
    logging.basicConfig(level=logging.ERROR, format="%(name)s: %(message)s")
    warnings.filterwarnings("ignore", category=FutureWarning)
    try:
        _execute(options)
    except Exception as error:
        return report(error)
    except KeyboardInterrupt:
        return complain("interrupted", INTERRUPTED)
    return 0


def _execute(options: Options) -> None:
    import torch

    where, number = parse_device(options.device), parse_dtype(options.dtype, options.device)
    torch.set_num_threads(options.threads or torch.get_num_threads())
    if options.prompt is not None and options.prompts is not None:
        raise ValueError("--prompt and --prompts exclude each other: the prompt file has all prompts")
    ranks = Ranks.start(where, options.timeout)
    try:
        if ranks.rank != 0:
            logging.getLogger("diffattn").setLevel(logging.ERROR)  # what is odd is told once
        run(ranks.together(options.request), ranks, where, number, options.timeout, progress=True)
        if ranks.rank == 0:
            typer.echo(f"wrote {options.output}")
    finally:
        if sys.exc_info()[0] is None:
            ranks.close()


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


def report(error: Exception) -> int:
    """Say what went wrong, as far as it is no bug; the exit code."""
    if isinstance(error, RunError) and not os.environ.get(DEBUG):
        return complain(str(error), FAILED)
    if os.environ.get(DEBUG) or not is_expected(error):
        raise error
    return complain(error.format_message() if hasattr(error, "format_message") else str(error), WRONG_INPUT)


def complain(text: str, code: int) -> int:
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    rank = f"rank {os.environ['RANK']}: " if several else ""
    typer.echo(f"diffattn: error: {rank}{' '.join(text.split())}", err=True)
    if several:
        time.sleep(LINGER)
    return code
