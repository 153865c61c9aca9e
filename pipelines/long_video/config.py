"""What a run computes: one frozen config, the same on every rank.

Devices, numbers of ranks, paths and time limits are not part of it: they change nothing in the video.
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from diffattn.mechanisms.dual_scope import EARLY, LATE, DualScopeAttention
from diffattn.mechanisms.parts.scopes.frames import Phase
from diffattn.options import Help, Must, shown
from diffattn.parallel.operations.noise import FrameNoise

from .prompts import PromptRange, as_ranges, check_ranges

WINDOW = "Attention along the frames"
MOST = {
    "frames": 1_000_000,
    "height": 16_384,
    "width": 16_384,
    "steps": 1000,
    "fps": 1000,
    "model_fps": 1000,
    "blend": 1_000_000,
    "padding": 10_000,
    "top_k": 10_000,
    "memory": 1_000_000,
}
"""The steps are those that models train with, and others are beyond what any machine or file holds."""
LARGEST_SCALE = 1e4
"""Beyond it, float16 overflows."""
SCHEDULERS = ("own", "dpmsolver++", "sde-dpmsolver++")


@dataclass(frozen=True, kw_only=True)
class LongVideoConfig:
    """A run; `to_dict` and `from_dict` are its JSON form."""

    prompts: tuple[PromptRange, ...]
    """Each frame has one."""
    frames: Annotated[int, Help("Frames of the whole video. Default: the prompt file's, or 48.")]
    height: Annotated[int, Help("In pixels. Default: the bundled model's own, or 320.")]
    width: Annotated[int, Help("In pixels. Default: the bundled model's own, or 512.")]
    model: Annotated[
        str, Help("tiny (bundled), videocrafter2, or folder or hub id of a text-to-video pipeline with a UNet3D.")
    ] = "tiny"
    unet: Annotated[str | None, Help("Folder or hub id of another UNet for it.")] = None
    negative_prompt: Annotated[str, Help("What not to show.")] = ""
    steps: Annotated[int, Help("Denoising steps. Default: the bundled model's own, or 30.")] = 30
    guidance: Annotated[
        float,
        Help("Guidance scale; up to 1: none, in half the time. Default: the bundled model's own, or 12."),
    ] = 12.0
    seed: Annotated[int, Help("Of all random numbers: same seed, same video.", panel="Every command takes")] = 0
    fps: Annotated[int, Help("Frames a second in the file. Default: 8.")] = 8
    model_fps: Annotated[
        int, Help("Frame rate that a model conditioned on it is told, as VideoCrafter2. Default: 24.")
    ] = 24
    blend: Annotated[int, Help("Frames in which a prompt goes over into the next; 0: a cut. Default: 16.")] = 16
    padding: Annotated[int, Help("Frames of local context on either side. Default: 8.", panel=WINDOW)] = 8
    top_k: Annotated[int, Help("Global frames, spread over the whole video. Default: 16.", panel=WINDOW)] = 16
    local_phase: tuple[float | None, float, float] | None = LATE
    """(t, local_bias, global_bias) of the steps below t; None: no bias."""
    global_phase: tuple[float | None, float, float] | None = EARLY
    """(t, local_bias, global_bias) of the steps from t on; None: no bias."""
    attn_scale: float = 1.0
    token_num_scale: bool = False
    train_frames: int = 16
    chosen_by: Annotated[
        Literal["place", "content"],
        Help("Which frames are global: evenly spread ones, or those that most others weigh most.", panel=WINDOW),
    ] = "place"
    rotation: Annotated[
        float, Help("By how many of their distances global frames move on during the steps. Default: 0.", panel=WINDOW)
    ] = 0.0
    memory: Annotated[
        int | None,
        Help("Frames out of sight count by their means over so many. Default: not at all.", panel=WINDOW),
    ] = None
    forget: Annotated[
        float, Help("With --memory: taken off a logit for each frame of distance. Default: 0.", panel=WINDOW)
    ] = 0.0
    mode: Annotated[
        Literal["clean", "official"],
        Help(
            "clean: does not depend on the number of ranks; official: what the released code computes, in equal clips. "
            "Default: clean.",
            panel=WINDOW,
        ),
    ] = "clean"
    lengths: Annotated[
        tuple[int, ...] | None,
        Must("numbers of frames with commas between, such as 100,60"),
        Help("Frames of each rank, as 100,60. Default: even.", panel=WINDOW),
    ] = None
    scheduler: Annotated[
        str, Help("own (the model's), dpmsolver++ or sde-dpmsolver++ (the released code's). Default: own.")
    ] = "own"

    def __post_init__(self) -> None:
        for name in ("frames", "height", "width", "steps", "fps", "model_fps", "blend", "padding", "top_k"):
            _check_int(name, getattr(self, name), 0 if name in ("blend", "padding", "top_k") else 1, MOST.get(name))
        if self.memory is not None:
            _check_int("memory", self.memory, 1, MOST["memory"])
        for name in ("guidance", "attn_scale", "rotation", "forget"):
            if not _is_number(getattr(self, name)) or abs(getattr(self, name)) > LARGEST_SCALE:
                raise ValueError(
                    f"{name} must be a number of at most {LARGEST_SCALE:g} in size, got {shown(getattr(self, name))}"
                )
        for text in (self.negative_prompt, *(part.prompt for part in self.prompts)):
            if isinstance(text, str) and any("\ud800" <= letter <= "\udfff" for letter in text):
                raise ValueError(f"a prompt must be text of whole characters, got {text!a}; write it as UTF-8")
        for name in ("model", "negative_prompt", "unet"):
            value = getattr(self, name)
            if not isinstance(value, str) and (name != "unet" or value is not None):
                raise ValueError(f"{name} must be a text, got {value!r}")
        if not isinstance(self.token_num_scale, bool):
            raise ValueError(f"token_num_scale must be true or false, got {self.token_num_scale!r}")
        for name in ("local_phase", "global_phase"):
            _check_phase(name, getattr(self, name))
        if self.mode not in ("clean", "official"):
            raise ValueError(f"mode must be 'clean' or 'official', got {self.mode!r}")
        if self.scheduler not in SCHEDULERS:
            raise ValueError(f"scheduler must be one of {', '.join(SCHEDULERS)}, got {self.scheduler!r}")
        object.__setattr__(self, "prompts", tuple(sorted(self.prompts, key=lambda part: part.first)))
        if self.lengths is not None:
            if not isinstance(self.lengths, (list, tuple)) or not self.lengths:
                raise ValueError(f"lengths must be a list of numbers of frames, got {self.lengths!r}")
            for length in self.lengths:
                _check_int("each of lengths", length, 1)
            object.__setattr__(self, "lengths", tuple(self.lengths))
        check_ranges(self.prompts, self.frames)
        FrameNoise(self.seed)
        self.attention()

    def attention(self) -> DualScopeAttention:
        """What the attention along the frames computes; raises `ValueError` where its options are wrong."""
        return DualScopeAttention(
            padding=self.padding,
            top_k=self.top_k,
            local_phase=None if self.local_phase is None else Phase(*self.local_phase),
            global_phase=None if self.global_phase is None else Phase(*self.global_phase),
            attn_scale=self.attn_scale,
            token_num_scale=self.token_num_scale,
            train_frames=self.train_frames,
            chosen_by=self.chosen_by,
            rotation=self.rotation,
            memory=self.memory,
            forget=self.forget,
        )

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        values = dataclasses.asdict(self)
        values["prompts"] = [{"frames": [part.first, part.end], "prompt": part.prompt} for part in self.prompts]
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "LongVideoConfig":
        """From what `to_dict` gives; fields that are missing have their defaults, unknown ones raise `ValueError`."""
        check_names(values, [field.name for field in dataclasses.fields(cls)], "the config")
        missing = [
            field.name
            for field in dataclasses.fields(cls)
            if field.default is dataclasses.MISSING and field.name not in values
        ]
        if missing:
            raise ValueError(f"the config lacks {', '.join(missing)}")
        phases = {
            name: tuple(values[name])
            for name in ("local_phase", "global_phase")
            if isinstance(values.get(name), (list, tuple))
        }
        return cls(**{**values, "prompts": as_ranges(values["prompts"], "prompts"), **phases})

    def same_video(self, other: "LongVideoConfig") -> list[str]:
        """The names of fields that make another video: a checkpoint of it can't be gone on with."""
        free = {"fps"} | ({"lengths"} if self.mode == "clean" else set())
        return [
            field.name
            for field in dataclasses.fields(self)
            if field.name not in free and getattr(self, field.name) != getattr(other, field.name)
        ]


def check_names(values: Any, known: list[str], where: str) -> None:
    """Raise `ValueError` on a name nobody knows, or where there are no names at all."""
    if not isinstance(values, Mapping):
        raise ValueError(f"{where} must be a JSON object, got {type(values).__name__}")
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise ValueError(f"{where} has unknown entries {', '.join(unknown)}; known are {', '.join(known)}")


def _is_number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an int that no float holds
        return False


def _check_phase(name: str, value: Any) -> None:
    """Raise `ValueError` for what is neither None nor (t, local_bias, global_bias)."""
    if value is None:
        return
    if not isinstance(value, tuple) or len(value) != 3 or not all(map(_is_number, value[1:])):
        raise ValueError(f"{name} must be [t, local_bias, global_bias] or null, got {shown(value)}")
    if value[0] is not None and not _is_number(value[0]):
        raise ValueError(f"the t of {name} must be a number or null, got {shown(value[0])}")


def _check_int(name: str, value: Any, least: int, most: int | None = None) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} must be a whole number of at least {least}, got {shown(value)}")
    if most is not None and value > most:
        raise ValueError(f"{name} must be at most {most}, got {shown(value)}")
