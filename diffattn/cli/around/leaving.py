"""Records that commands leave beside what they made (`diffattn.files.records`)."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ...files.records import recorded
from .config_files import OPTIONS


def video_sizes(path: Path) -> dict[str, Any]:
    """What a record says of a video file."""
    from ...media.video import probe

    info = probe(path)
    return {"files": [path], "height": info.height, "width": info.width, "frames": info.frames}


@contextlib.contextmanager
def leaving_record(context: Any, place: Path, device: str, dtype: str, **others: Any) -> Iterator[dict[str, Any]]:
    """Write the record of what the block makes.

    Args:
        context: of the command.
        place: of the record.
        device: as it was typed; what it came to here is recorded, but for several processes.
        dtype: likewise.
        others: options with other values than those that were typed.

    Gives a dict for what was made: `files`, `height`, `width`, `frames`.
    """
    import torch

    from ..arguments import parse_device, parse_dtype

    where, processes = parse_device(device), int(os.environ.get("WORLD_SIZE", "1"))
    came_to = {"dtype": str(parse_dtype(dtype, where)).removeprefix("torch."), "threads": torch.get_num_threads()}
    options = {**context.meta[OPTIONS], "device": device if processes > 1 else str(where), **came_to, **others}
    with recorded(place, context.command.name, options) as made:
        yield made
        if processes > 1:
            made["processes"] = processes
