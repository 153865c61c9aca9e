"""Images in files, one after the other: what goes where, what is there already, and what became of each."""

import contextlib
import logging
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from PIL.Image import Resampling
from tqdm import tqdm

from diffattn.files.records import check_record, path_beside
from diffattn.measure.progress import bar_options
from diffattn.media.outputs import check_folder
from diffattn.media.pictures import (
    FORMATS,
    LONGEST_SIDE,
    Picture,
    find_pictures,
    read_picture,
    side_by_side,
    write_picture,
)

logger = logging.getLogger("diffattn")

FAILURES = (ValueError, OSError, MemoryError, RuntimeError)
"""What one image may fail by while the others go on: its file, its size, the device's memory."""


@dataclass(frozen=True)
class Job:
    """One image."""

    source: Path
    target: Path
    sheet: Path | None = None
    """Where the comparison goes, if there is to be one."""
    record: Path | None = None
    """Where the JSON file goes that says what made the result."""

    @property
    def written(self) -> list[Path]:
        """All that is written."""
        return [self.target] if self.sheet is None else [self.target, self.sheet]


Recording = Callable[[Job], AbstractContextManager[dict[str, Any]]]
"""Leaves the record of a result that is written in its block."""


@dataclass
class Tally:
    """How many images ended how."""

    done: int = 0
    skipped: int = 0
    failed: int = 0
    seconds: float = 0.0
    """Of those done."""

    def __str__(self) -> str:
        pace = f"; {self.seconds / self.done:.1f} s an image" if self.done else ""
        return f"{self.done} done, {self.skipped} skipped, {self.failed} failed{pace}"


def plan_jobs(inputs: Sequence[str | Path], output: Path, *, ending: str | None = None, sheets: bool) -> list[Job]:
    """What is to be made of the images that `inputs` name, without touching a file.

    Args:
        inputs: as `find_pictures` takes them.
        output: folder of the results, which are named as their sources.
        ending: of the results; None: that of the source where it can be written, else `.png`.
        sheets: a comparison `<stem>-compare.png` beside each result.

    Raises `ValueError` for inputs without images, a folder that can't be written, and results that would overwrite
    each other or an input.
    """
    check_folder(output)
    jobs = []
    for source in find_pictures(inputs):
        own = source.suffix.lower() if source.suffix.lower() in FORMATS else ".png"
        sheet = output / f"{source.stem}-compare.png" if sheets else None
        jobs.append(Job(source, output / f"{source.stem}{ending or own}", sheet))
    check_names(jobs)
    stems = Counter(job.target.stem for job in jobs)
    return [replace(job, record=path_beside(job.target, full=stems[job.target.stem] > 1)) for job in jobs]


def check_records(jobs: Sequence[Job], overwrite: bool) -> None:
    """Raise `ValueError` where the record of a result that is to be made would replace another file."""
    for job in jobs:
        if job.record is not None and (overwrite or not job.target.exists()):
            check_record(job.record, overwrite=overwrite)


def unrecorded(job: Job) -> AbstractContextManager[dict[str, Any]]:
    """Keeps no record."""
    return contextlib.nullcontext({})


def check_names(jobs: Sequence[Job]) -> None:
    """Raise `ValueError` for two results of one name, and for one over an input."""
    inputs, owners = {job.source.resolve() for job in jobs}, dict[Path, Path]()
    for job in jobs:
        for path in job.written:
            if path.resolve() in inputs:
                raise ValueError(f"the result of {job.source} would overwrite the input {path}; give another --output")
            other = owners.setdefault(path, job.source)
            if other != job.source:
                raise ValueError(f"{other} and {job.source} would both be written to {path}; rename one of them")


def run_jobs(
    jobs: Sequence[Job],
    restore: Callable[[Picture], Picture],
    *,
    factor: float,
    overwrite: bool = False,
    recording: Recording = unrecorded,
) -> Tally:
    """Make what is not there yet; an image that fails gets a line on stderr, and the others are made.

    Args:
        jobs: from `plan_jobs`.
        restore: makes an image `factor` times as large in both directions.
        factor: see there.
        overwrite: make what is there as well. Files that are cut off do not count as there.
        recording: in its block a result is written; it gets what was made, and leaves the record.
    """
    tally = Tally()
    for job in tqdm(jobs, desc="images", unit="picture", **bar_options(leave=True)):
        start = time.perf_counter()
        try:
            made = make(job, restore, factor, overwrite, recording)
        except FAILURES as error:
            tally.failed += 1
            logger.info("%s failed", job.source, exc_info=True)
            tqdm.write(f"diffattn: error: {describe(job, error)}", file=sys.stderr)
            continue
        seconds = time.perf_counter() - start
        if made:
            tally.done, tally.seconds = tally.done + 1, tally.seconds + seconds
            tqdm.write(f"wrote {' and '.join(map(str, made))} in {seconds:.1f} s")
        else:
            tally.skipped += 1
            tqdm.write(f"skipped {job.source}: {job.target} is there; --overwrite makes it anew")
    return tally


def make(
    job: Job, restore: Callable[[Picture], Picture], factor: float, overwrite: bool, recording: Recording = unrecorded
) -> list[Path]:
    """Write what is missing of a job; the files written."""
    made = []
    if overwrite or not is_whole(job.target):
        picture = read_picture(job.source)
        check_side(picture, factor, job.target)
        restored = restore(picture)
        with recording(job) as record:
            write_picture(job.target, restored.pixels, restored.alpha, restored.icc)
            height, width = restored.pixels.shape[:2]
            record |= {"files": [job.target], "height": height, "width": width}
        made.append(job.target)
    if job.sheet is not None and (made or not is_whole(job.sheet)):
        write_sheet(job.source, job.target, job.sheet)
        made.append(job.sheet)
    return made


def check_side(picture: Picture, factor: float, target: Path) -> None:
    """Raise `ValueError`, before the work, for a result larger than its format holds."""
    kind = FORMATS[target.suffix.lower()]
    side = round(max(picture.pixels.shape) * factor)
    if side > LONGEST_SIDE[kind]:
        raise ValueError(
            f"expected a result of at most {LONGEST_SIDE[kind]} pixels a side for {kind}; got {side}; "
            "lower --scale, or add --format png"
        )


def is_whole(path: Path) -> bool:
    """Is there an image that can be read to its end?"""
    try:
        read_result(path)
    except (ValueError, FileNotFoundError):
        return False
    return True


def read_result(path: Path) -> Picture:
    """Read an image of our own, of any size: Pillow's limit is meant for files from elsewhere."""
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        return read_picture(path)
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def write_sheet(source: Path, target: Path, sheet: Path) -> None:
    """Input, enlarged bicubically, and result side by side."""
    result = read_result(target).pixels
    size = result.shape[1], result.shape[0]
    enlarged = Image.fromarray(read_picture(source).pixels).resize(size, Resampling.BICUBIC)
    write_picture(sheet, side_by_side([np.asarray(enlarged), result], ["input, bicubic", "PASD"]))


def describe(job: Job, error: BaseException) -> str:
    """An error as one line that names the image."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if str(job.source) in text else f"{job.source}: {text}"
