"""The teacher makes its own training set: an image for every prompt, or a clip.

A student trained on what its teacher draws keeps the teacher's look better than one trained on photographs (CLEAR,
https://arxiv.org/abs/2412.16112). Image or clip i depends on its prompt, `seed` + i and the call alone.
"""

import inspect
import json
import os
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from diffattn.files.writing import write_json, written
from diffattn.measure.progress import bar_options
from diffattn.media.video import VideoWriter, pyav
from diffattn.options import shown
from diffattn.swap.plan import models_of

from ..encoders import check_frames, multiple_of
from .fingerprints import of_parts
from .pictures import Counts, check_output, share

RATE = 16
"""Frames a second of a clip's file, those of Wan 2.1."""


def read_prompts(file: str | os.PathLike[str]) -> list[str]:
    """The prompts of a text file, one per line, or of a JSON list; blank lines don't count."""
    path = Path(file)
    try:
        text = path.read_text(encoding="utf-8-sig")
        prompts = json.loads(text) if path.suffix == ".json" else text.split("\n")
    except (OSError, ValueError) as error:
        raise ValueError(f"expected a text file or a JSON list of prompts, got {path} ({error})") from error
    if not isinstance(prompts, list) or not all(isinstance(prompt, str) for prompt in prompts):
        raise ValueError(f'expected a JSON list of strings like ["a red circle", ...] in {path}, got something else')
    prompts = [prompt.strip() for prompt in prompts if prompt.strip()]
    if not prompts:
        raise ValueError(f"expected prompts in {path}, got none; write one per line")
    return prompts


def make_pictures(
    pipe: Any,
    prompts: Sequence[str],
    folder: str | os.PathLike[str],
    *,
    seed: int = 0,
    call: Mapping[str, Any] | None = None,
    fps: Fraction | int = RATE,
    batch_size: int = 1,
    rank: int = 0,
    world: int = 1,
    progress: bool = False,
) -> Counts:
    """Draw prompt i, from noise of `seed` + i, to 00000i.png and its prompt to 00000i.json; what is there is skipped.

    00000i.json says besides by which model and call the image was drawn. With `num_frames` in the call, of more than
    one frame, a video pipeline's clips go to 00000i.mp4.

    Args:
        call: further arguments of the pipeline's call, such as the number of steps.
        fps: frames a second of the files of clips; pipelines do not say theirs.
        rank: this process draws every `world`-th prompt, from the `rank`-th on.

    Raises `ValueError` where the folder holds images of other prompts, seeds, models, sizes or other arguments.
    """
    if isinstance(prompts, str) or not prompts:
        raise ValueError(f"expected a list of prompts, got {prompts!r}; read_prompts reads one from a file")
    if batch_size < 1:
        raise ValueError(f"expected a batch_size of 1 or more, got {batch_size}")
    root = Path(folder)
    check_output(root)
    _check_call(pipe, call or {})
    clips = (call or {}).get("num_frames", 1) > 1
    common = {"call": _plain(call or {}), "model": of_parts(getattr(pipe, "components", {}).values())}
    if clips:
        if fps <= 0:
            raise ValueError(f"expected frames a second above 0, got fps={fps}; {RATE} is the default")
        pyav()  # before anything is drawn
        common["fps"] = str(Fraction(fps))
    wanted = {
        index: {"prompt": prompts[index], "seed": seed + index, **common}
        for index in share(range(len(prompts)), rank, world)
    }
    files = {index: root / f"{index:06d}{'.mp4' if clips else '.png'}" for index in wanted}
    lacking = [index for index, said in wanted.items() if not _made(files[index], said)]
    with tqdm(total=len(lacking), desc="clips" if clips else "images", **bar_options(progress, leave=True)) as bar:
        for start in range(0, len(lacking), batch_size):
            batch = {files[index]: wanted[index] for index in lacking[start : start + batch_size]}
            _draw(pipe, batch, call or {})
            bar.update(len(batch))
    return Counts(done=len(lacking), skipped=len(wanted) - len(lacking))


def _check_call(pipe: Any, call: Mapping[str, Any]) -> None:
    """Raise for a size or length that the pipeline would round; where it is not known how, `_draw` sees it."""
    if "num_frames" in call:
        if not _takes_frames(pipe):
            raise ValueError(f"{type(pipe).__name__} draws images, got num_frames={call['num_frames']}; leave it out")
        check_frames(pipe, call["num_frames"])
    try:
        token = multiple_of(pipe, models_of(pipe)[0])[1]
    except (TypeError, ValueError, AttributeError):
        return
    wrong = [side for side in ("height", "width") if side in call and (call[side] < 1 or call[side] % token)]
    if wrong:
        raise ValueError(
            f"expected a height and width in multiples of {token} pixels, got {wrong[0]}={call[wrong[0]]}; round it"
        )


def _made(picture: Path, said: dict[str, Any]) -> bool:
    """Whether an image is there; raises `ValueError` where it is another one."""
    try:
        known = json.loads(picture.with_suffix(".json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    known = {name: value for name, value in known.items() if value is not None} if isinstance(known, dict) else {}
    wrong = [name for name, value in said.items() if value is not None and known.get(name, value) != value]
    if wrong:
        want, got = ({name: values[name] for name in wrong} for values in (said, known))
        raise ValueError(
            f"expected {picture} to be of {shown(want)}, got {shown(got)}; use another folder, or the former prompts "
            f"and options"
        )
    if not picture.exists() or picture.suffix != ".png":
        return picture.exists()
    size = [said["call"].get(side) for side in ("height", "width")]
    if "call" not in known and None not in size and _size(picture) != size:  # of a release that did not say it
        raise ValueError(
            f"expected {picture} to be of height and width {size}, got {_size(picture)}; use another folder"
        )
    return True


def _size(picture: Path) -> list[int]:
    """Height and width, by the file's head."""
    with Image.open(picture) as image:
        return [image.height, image.width]


def _plain(call: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a call as JSON has them; other values by their text."""
    return {
        name: value if isinstance(value, (bool, int, float, str, type(None))) else shown(value)
        for name, value in call.items()
    }


def _draw(pipe: Any, batch: Mapping[Path, dict[str, Any]], call: Mapping[str, Any]) -> None:
    texts, seeds = ([said[name] for said in batch.values()] for name in ("prompt", "seed"))
    for (path, said), frames in zip(batch.items(), draw(pipe, texts, seeds, **call), strict=True):
        picture = frames[0]
        asked = call.get("width", picture.width), call.get("height", picture.height)
        if picture.size != asked:  # pipelines round a size, with no more than a log line
            raise ValueError(
                f"expected images of height {asked[1]} and width {asked[0]}, the pipeline draws {picture.height} and "
                f"{picture.width}: ask for that size, or for another"
            )
        if len(frames) != call.get("num_frames", 1):
            raise ValueError(
                f"expected clips of {call['num_frames']} frames, the pipeline draws {len(frames)}: ask for so many"
            )
        _write(path, frames, Fraction(said.get("fps", RATE)))
        # Last: it says that the image is whole.
        write_json(path.with_suffix(".json"), said)


def _write(path: Path, frames: Sequence[Image.Image], fps: Fraction) -> None:
    """An image, or a clip as a video."""
    if path.suffix == ".png":
        with written(path) as temporary:
            frames[0].save(temporary)
        return
    with VideoWriter(path, fps) as video:
        for frame in frames:
            video.write(np.asarray(frame))


def _takes_frames(pipe: Any) -> bool:
    return "num_frames" in inspect.signature(type(pipe).__call__).parameters


def draw(pipe: Any, prompts: Sequence[str], seeds: Sequence[int], **call: Any) -> list[list[Image.Image]]:
    """The frames of a clip for every prompt, from the noise of its seed; one frame where `num_frames` is not given."""
    if _takes_frames(pipe):
        call = {"num_frames": 1, **call}
    # On the CPU, so that every machine draws the same noise.
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    answer = pipe(prompt=list(prompts), generator=generators, output_type="pil", **call)
    return [list(clip) for clip in answer.frames] if hasattr(answer, "frames") else [[one] for one in answer.images]
