"""From what is typed on the command line to what the library takes. Wrong text raises `ValueError` with an example."""

import dataclasses
import re
import typing
from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch

from .. import config
from ..grid import TokenGrid
from ..mechanisms.base import Mechanism
from ..options import Text, describe, fits, hints_of

DTYPES = ("float32", "float16", "bfloat16", "float64")


def parse_device(text: str) -> torch.device:
    """`cpu`, `cuda`, `cuda:1`, `mps` ..., or `auto` for the first GPU there is, else the CPU."""
    if text == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(text)
    except RuntimeError:
        raise ValueError(f"--device {text!r} is no device; give cpu, cuda, cuda:1, mps or auto") from None
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            raise ValueError(f"--device {text}: this torch sees {count} CUDA devices; use --device cpu")
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError, ImportError) as error:
        reason = " ".join(str(error).split())[:120]
        raise ValueError(f"--device {text}: this torch cannot use it here ({reason}); use --device cpu") from error
    if device.type == "meta":
        raise ValueError("--device meta has no memory to compute in; use --device cpu")
    return device


def parse_dtype(text: str, device: torch.device) -> torch.dtype:
    """One of `DTYPES`, or `auto`: bfloat16 on a GPU, float32 on the CPU."""
    if text == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    if text not in DTYPES:
        raise ValueError(f"--dtype must be one of {', '.join(DTYPES)} or auto, got {text!r}")
    return typing.cast(torch.dtype, getattr(torch, text))


def parse_grid(text: str, before: int = 0, after: int = 0) -> TokenGrid:
    """`ROWSxCOLUMNS` or `FRAMESxROWSxCOLUMNS`, in tokens.

    >>> parse_grid("8x16x24", before=4)
    TokenGrid(height=16, width=24, frames=8, before=4, after=0, silent=(0, 0))
    """
    if not re.fullmatch(r"\d{1,9}x\d{1,9}(x\d{1,9})?", text):
        raise ValueError(
            f"--grid must be ROWSxCOLUMNS or FRAMESxROWSxCOLUMNS in tokens, such as 16x24 or 8x16x24, got {text!r}"
        )
    frames, height, width = [1, *map(int, text.split("x"))][-3:]
    return TokenGrid(height, width, frames, before, after)


def parse_size(text: str) -> tuple[int, int]:
    """`HEIGHTxWIDTH` in pixels."""
    match = re.fullmatch(r"([1-9]\d{0,8})x([1-9]\d{0,8})", text)
    if match is None:
        raise ValueError(f"--size must be HEIGHTxWIDTH in pixels, such as 2048x4096, got {text!r}")
    return int(match[1]), int(match[2])


def parse_rate(text: str) -> Fraction:
    """Frames a second: `25`, `29.97` or `30000/1001`."""
    try:
        rate = Fraction(text)
    except (ValueError, ZeroDivisionError):
        rate = Fraction(0)
    if rate <= 0:
        raise ValueError(f"--fps must be a positive number such as 16 or 30000/1001, got {text!r}")
    return rate


def parse_cell(text: str, grid: TokenGrid) -> tuple[int, int, int]:
    """`ROW,COLUMN` or `FRAME,ROW,COLUMN` of a cell of `grid`, counted from 0, as (frame, row, column)."""
    if not re.fullmatch(r"\d+,\d+(,\d+)?", text):
        raise ValueError(f"--query must be ROW,COLUMN or FRAME,ROW,COLUMN, counted from 0, such as 5,7, got {text!r}")
    frame, row, column = [0, *map(int, text.split(","))][-3:]
    if frame >= grid.frames or row >= grid.height or column >= grid.width:
        raise ValueError(f"--query {text} lies outside the grid {grid}; rows, columns and frames count from 0")
    return frame, row, column


def parse_steps(text: str | None) -> slice | None:
    """A slice of the denoising steps as in Python: `4:`, `:10`, `4:20:2`."""
    if text is None:
        return None
    if not re.fullmatch(r"(-?\d+)?:(-?\d+)?(:-?\d+)?", text):
        raise ValueError(f"--swap-steps must be a slice such as 4: (from the fifth step on) or :10, got {text!r}")
    parts = [int(part) if part else None for part in text.split(":")]
    if len(parts) == 3 and parts[2] == 0:
        raise ValueError(f"--swap-steps: a slice cannot step by 0, got {text!r}")
    return slice(*parts)


def parse_mechanism(name: str, options: Iterable[str] = ()) -> Mechanism:
    """The mechanism `name` with options such as `radius=16`, read by the types of its config's fields."""
    cls = config.lookup(name)
    values = parse_options(options)
    hints = hints_of(cls)
    for key, text in values.items():
        if not fits(text, hints.get(key, Any)):
            raise ValueError(f"-o {key}={text}: expected {describe(hints[key])}, got {str(text)!r}")
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}
    required = [key for key, field in fields.items() if field.default is field.default_factory is dataclasses.MISSING]
    missing = [key for key in required if key not in values]
    if missing and values.keys() <= fields.keys():
        raise ValueError(f"{name} needs {', '.join(missing)}: add -o {missing[0]}=...")
    return typing.cast(Mechanism, config.create(name, **values))


def parse_mechanism_text(text: str) -> Mechanism:
    """A mechanism and its options in one text: `agent num_agents=64 k_shortcut=0`."""
    if not text.split():
        raise ValueError("--mechanism must be a short name, such as agent, got nothing")
    name, *options = text.split()
    return parse_mechanism(name, options)


def read_prompts(path: Path) -> list[str]:
    """The lines of a file, without empty ones and those that begin with #."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"expected a text file with a prompt on each line; cannot read {path}: {error}") from error
    prompts = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    if not prompts:
        raise ValueError(f"expected a prompt on each line of {path}; it has none")
    return prompts


def parse_options(options: Iterable[str]) -> dict[str, Text]:
    """`KEY=VALUE` texts, for the config that they are for to read by the types of its fields."""
    values: dict[str, Text] = {}
    for option in options:
        key, equals, text = option.partition("=")
        key = key.strip().replace("-", "_")
        if not equals or not key:
            raise ValueError(f"-o must be NAME=VALUE, such as radius=16, got {option!r}")
        if key in values:
            raise ValueError(f"-o {key} is given twice")
        values[key] = Text(text.strip())
    return values
