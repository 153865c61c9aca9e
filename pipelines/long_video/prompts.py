"""Prompts by frame: ranges of frames from a JSON file, and where each range's text holds.

    [{"frames": [0, 120], "prompt": "a calm sea"}, {"frames": [120, 240], "prompt": "a storm"}]

`frames` is [first, end), the end not included. Between two ranges the conditioning goes over in a straight line of
`blend` frames, half of them on either side of the border; 0 is a hard cut.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class PromptRange:
    """A prompt for the frames `first` to `end - 1`."""

    first: int
    end: int
    prompt: str


def read_prompts(path: Path) -> tuple[PromptRange, ...]:
    """The ranges of a prompt file, as they stand there; `check_ranges` says whether they fit a video."""
    return as_ranges(read_json(path), str(path))


def as_ranges(entries: Any, where: str) -> tuple[PromptRange, ...]:
    """The ranges of a list as JSON has it; raises `ValueError` that names the entry, and `where` the list stands."""
    if not isinstance(entries, (list, tuple)):
        raise ValueError(f"{where}: expected a list of ranges, such as {_EXAMPLE}, got {json.dumps(entries)}")
    if not entries:
        raise ValueError(f"{where}: at least one prompt is needed, such as {_EXAMPLE}, got none")
    return tuple(
        entry if isinstance(entry, PromptRange) else _range(entry, f"{where}, entry {number}")
        for number, entry in enumerate(entries, 1)
    )


_EXAMPLE = '[{"frames": [0, 120], "prompt": "a calm sea"}]'


def _range(entry: Any, where: str) -> PromptRange:
    fits = isinstance(entry, dict) and entry.keys() == {"frames", "prompt"} and isinstance(entry["prompt"], str)
    frames = entry["frames"] if fits else None
    if not isinstance(frames, list) or len(frames) != 2 or not all(type(number) is int for number in frames):
        raise ValueError(f'{where}: expected {{"frames": [first, end], "prompt": "..."}}, got {json.dumps(entry)}')
    return PromptRange(frames[0], frames[1], entry["prompt"])


def read_json(path: Path) -> Any:
    """The content of a JSON file; what is no JSON raises `ValueError` with the place."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON file: {error}") from None


def check_ranges(ranges: Sequence[PromptRange], frames: int) -> None:
    """Raise `ValueError` unless every frame of the video has one prompt."""
    if not ranges:
        raise ValueError("at least one prompt is needed; give --prompt or --prompts")
    expected = 0
    for part in sorted(ranges, key=lambda part: part.first):
        if part.end <= part.first:
            raise ValueError(f"the prompt {part.prompt!r} has the frames [{part.first}, {part.end}), which are none")
        if part.first != expected:
            what = "overlap" if part.first < expected else "leave a gap"
            raise ValueError(
                f"the prompts' ranges {what}: frame {min(part.first, expected)} has "
                f"{'two prompts' if part.first < expected else 'none'}; expected a range from frame {expected}, got "
                f"[{part.first}, {part.end})"
            )
        expected = part.end
    if expected != frames:
        raise ValueError(
            f"the prompts' ranges end at frame {expected} and the video has {frames} frames; make them equal, by "
            f"--frames {expected} or by the last range"
        )


def places(ranges: Sequence[PromptRange], blend: int) -> dict[int, str]:
    """Frame -> prompt, for `diffattn.parallel.frame_prompts`: a straight line from each place to the next.

    >>> places([PromptRange(0, 10, "a"), PromptRange(10, 20, "b")], blend=4)
    {2: 'a', 7: 'a', 12: 'b', 17: 'b'}
    """
    found = {}
    for part in ranges:
        half = min(blend // 2, (part.end - part.first - 1) // 2)
        found[part.first + half] = found[part.end - 1 - half] = part.prompt
    return found


def even_ranges(prompts: Sequence[str], frames: int, clips: int) -> tuple[PromptRange, ...]:
    """The released code's rule: clip r of `clips` equal ones has the prompt number floor(r prompts / clips)."""
    length = frames // clips
    ranges: list[PromptRange] = []
    for clip in range(clips):
        prompt = prompts[clip * len(prompts) // clips]
        if ranges and ranges[-1].prompt == prompt:
            ranges[-1] = PromptRange(ranges[-1].first, (clip + 1) * length, prompt)
        else:
            ranges.append(PromptRange(clip * length, (clip + 1) * length, prompt))
    return tuple(ranges)
