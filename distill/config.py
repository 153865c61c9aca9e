"""The whole of a distillation run as one frozen config: presets are functions, files and overrides change fields.

config = tiny()
config = read_config("run.toml", base=config)          # or JSON; unknown fields raise
config = override(config, ["steps=500", "mechanism.radius=2", "loss.attention=0"])
"""

import dataclasses
import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from diffattn import ClearAttention
from diffattn import config as mechanisms
from diffattn.adapters.slopes import check_leaning
from diffattn.files.tables import read_table
from diffattn.mechanisms import Mechanism
from diffattn.options import Must, Text, check_fields, known, read, shown

from .training.losses import LossWeights

Tracker = Literal["tensorboard", "wandb", "trackio"]
NOT_NEGATIVE = Must("0 or more", lambda value: value >= 0)
SHARE = Must("in 0 ... 1", lambda value: 0 <= value < 1)


def _whole(least: int) -> Must:
    return Must(f"an integer of at least {least}", lambda value: value >= least)


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """One run. Batches are counted over all processes and accumulated parts."""

    model: Annotated[str, Must("the hub id or folder of a pipeline", bool)]
    """Hub id or folder of a diffusers pipeline; `tiny` and `tiny:wan` are bundled ones, for images and clips."""
    part: str | None = None
    """Of a pipeline with several models, as Wan 2.2's two, the one that is trained, such as transformer_2."""
    mechanism: Mechanism
    """What the student's attention becomes."""
    drawn: Mapping[str, Any] = field(default_factory=dict)
    """Options of the mechanism that are drawn anew at every step, from the values given here: `{"radius": (3, 4, 6)}`.
    One adapter then serves all of them, and `mechanism` is what it says of itself."""
    data: str = ""
    """Folder of cached samples (`diffattn distill cache`); `shapes` and `moving` are the bundled pipelines' worlds."""
    frames: Annotated[int | None, _whole(1)] = None
    """Frames of a clip, of a video model; None: those of the data."""
    trainable: Literal["projections", "lora", "mechanism"] = "projections"
    lora_rank: Annotated[int, _whole(1)] = 16
    backend: str = "auto"
    """Kernel of the mechanism; it must have gradients."""
    layers: str | None = None
    """Glob on the layers that are swapped; None: all that the mechanism takes."""
    loss: LossWeights = field(default_factory=LossWeights)
    attention_layers: str = "*"
    """Glob on the swapped layers among which the attention loss chooses."""
    attention_depths: Annotated[
        tuple[float, ...],
        Must("fractions from 0 to 1, such as 0,0.5,1", lambda depths: all(0 <= own <= 1 for own in depths)),
    ] = (0.0, 0.25, 0.5, 0.75, 1.0)
    """Its layers as fractions of the depth, 0 the first and 1 the last of those. Those of the feature loss too."""
    slopes: bool = False
    """Projections lean with the option that is drawn: each has a slope beside it, and `load` gives those of a value."""
    layerwise: Annotated[int, _whole(0)] = 0
    """The first steps, in which every layer learns by itself: on the teacher's input, to give the teacher's output."""
    noises: Annotated[int, _whole(0)] = 0
    """How many noises a sample has, which recur; 0: a new one at every visit."""
    teacher_cache: Annotated[float, NOT_NEGATIVE] = 0.0
    """GiB on disk for what the teacher says to samples and noises that recur; 0 to ask it every time."""
    steps: Annotated[int, _whole(1)] = 10_000
    batch_size: Annotated[int, _whole(1)] = 32
    accumulation: Annotated[int, _whole(1)] = 1
    """Parts of a process's share of a batch that are computed one after the other."""
    optimizer: Literal["adamw", "prodigy"] = "adamw"
    rate: Annotated[float, Must("positive", lambda rate: rate > 0)] = 1e-4
    betas: Annotated[
        tuple[float, float],
        Must("two numbers from 0 to below 1, such as 0.9,0.999", lambda betas: all(0 <= beta < 1 for beta in betas)),
    ] = (0.9, 0.999)
    weight_decay: Annotated[float, NOT_NEGATIVE] = 1e-4
    warmup: Annotated[int, _whole(0)] = 0
    """Steps over which the rate rises from 0."""
    decay: Annotated[float, SHARE] = 0.0
    """Share of the steps, at the end, over which it falls to 0."""
    clip: Annotated[float, NOT_NEGATIVE] = 1.0
    """Largest norm of all gradients together; 0 for no limit."""
    ema: Annotated[float, SHARE] = 0.0
    """Decay of the averaged weights that are exported; 0 for none."""
    precision: Literal["no", "bf16", "fp16"] = "no"
    gradient_checkpointing: bool = False
    sharded: bool = False
    """Split the weights over the processes (`fully_shard`) instead of holding a copy in each."""
    guidance: float | None = None
    """Guidance that a guidance-distilled model is given in training."""
    text_length: Annotated[int | None, _whole(1)] = None
    """Text tokens; None: the pipeline's own."""
    save_every: Annotated[int, _whole(1)] = 500
    keep: Annotated[int, _whole(1)] = 2
    """Checkpoints that are kept."""
    sheet_every: Annotated[int, _whole(0)] = 0
    """Steps between sheets of images, teacher beside student; 0 for none."""
    sheet_prompts: tuple[str, ...] = ()
    """Their prompts; of the bundled world's own where there are none."""
    trackers: Annotated[tuple[Tracker, ...], Must("among tensorboard, wandb, trackio")] = ()
    """Where losses and sheets are reported beside `log.csv`: tensorboard, wandb, trackio."""
    seed: Annotated[int, Must("an integer of at least 0 and below 2**32", lambda seed: 0 <= seed < 2**32)] = 0

    def __post_init__(self) -> None:
        check_fields(self)
        for name, kind, example in (
            ("mechanism", Mechanism, "ClearAttention(radius=16)"),
            ("loss", LossWeights, "LossWeights()"),
        ):
            if not isinstance(getattr(self, name), kind):
                raise ValueError(f"{name} must be a config such as {example}, got {shown(getattr(self, name))}")
        if self.batch_size % self.accumulation:
            raise ValueError(f"batch_size={self.batch_size} does not split into accumulation={self.accumulation} parts")
        if self.mechanism.exact:
            raise ValueError(f"{self.mechanism} is the teacher's own attention: nothing is to be distilled")
        self.mechanism.check_backend(self.backend)
        object.__setattr__(self, "drawn", _options_of(self.mechanism, self.drawn))
        if self.slopes:
            check_leaning(self.drawn)
            if self.trainable != "projections":
                raise ValueError(f"slopes are those of projections, got trainable={self.trainable}: leave one out")
        if self.teacher_cache and not self.noises:
            raise ValueError(
                f"teacher_cache={self.teacher_cache} keeps what recurs, and with noises=0 no noise does: give noises=1 "
                "or more, or teacher_cache=0"
            )

    @property
    def settings(self) -> tuple[Mechanism, ...]:
        """What the student's attention may be in a step: `mechanism`, with every combination of what is drawn."""
        own = self.mechanism.to_dict()
        combinations = itertools.product(*self.drawn.values())
        return tuple(mechanisms.from_dict(own | dict(zip(self.drawn, values, strict=True))) for values in combinations)

    def rate_at(self, step: int) -> float:
        """The learning rate of a step, from 0."""
        rising = (step + 1) / self.warmup if self.warmup else 1.0
        falling = (self.steps - step) / (self.decay * self.steps) if self.decay else 1.0
        return self.rate * min(1.0, rising, falling)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON; `from_dict` undoes it."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {
            **values,
            "mechanism": self.mechanism.to_dict(),
            "loss": dataclasses.asdict(self.loss),
            "drawn": {name: [mechanisms.plain(value) for value in own] for name, own in self.drawn.items()},
        }


FIXED = ("ntk_factor",)
"""Options of mechanisms that change the model once, and cannot be drawn."""


def _options_of(mechanism: Mechanism, drawn: Any) -> dict[str, tuple[Any, ...]]:
    """What is drawn, each value as the mechanism reads it; raises `ValueError` for what it does not take."""
    if not isinstance(drawn, Mapping):
        raise ValueError(f'drawn must be a table such as {{"radius": [3, 4, 6]}}, got {shown(drawn)}')
    found: dict[str, tuple[Any, ...]] = {}
    for name, given in drawn.items():
        if name in FIXED:
            raise ValueError(f"drawn: {name} is the same in all steps; give it as mechanism.{name}")
        values = read(f"drawn.{name}", given, tuple[Any, ...], "several values, such as 3,4,6")
        if len(values) < 2:
            raise ValueError(f"drawn.{name} must be several values, such as 3,4,6, got {shown(given)}")
        own = mechanism.to_dict()
        found[name] = tuple(getattr(mechanisms.from_dict({**own, name: value}), name) for value in values)
        if len(set(found[name])) < len(values):
            raise ValueError(f"drawn.{name} must be values that differ, got {shown(given)}")
    return found


def clear_flux_official(data: str = "", radius: float = 16) -> DistillConfig:
    """CLEAR's released recipe for FLUX.1-dev (arXiv 2412.16112; `distill.sh`): Prodigy, batches of 32, 1024 px."""
    return DistillConfig(
        model="black-forest-labs/FLUX.1-dev",
        mechanism=ClearAttention(radius=radius),
        data=data,
        loss=LossWeights(target=1.0, prediction=0.5, attention=0.5),
        attention_layers="single_transformer_blocks.*",
        attention_depths=tuple(block / 37 for block in range(1, 38, 4)),
        steps=50_000,
        batch_size=32,
        accumulation=4,
        optimizer="prodigy",
        rate=1.0,
        weight_decay=1e-4,
        clip=1.0,
        precision="bf16",
        gradient_checkpointing=True,
        guidance=3.5,
        text_length=512,
        save_every=5_000,
    )


def tiny(data: str = "shapes", radius: float = 4) -> DistillConfig:
    """The bundled pipeline on two CPU cores, in minutes: 256 image tokens, a disc of 45 of them."""
    return DistillConfig(
        model="tiny",
        mechanism=ClearAttention(radius=radius),
        data=data,
        loss=LossWeights(target=1.0, prediction=0.5, attention=0.005),
        steps=300,
        batch_size=16,
        rate=5e-4,
        warmup=20,
        decay=0.5,
        text_length=32,
        save_every=100,
    )


def tiny_video(data: str = "moving", radius: float = 16, radius_t: float = 2) -> DistillConfig:
    """The bundled Wan pipeline on one CPU core, in minutes: a latent frame of nine sees itself and those beside it."""
    return DistillConfig(
        model="tiny:wan",
        mechanism=ClearAttention(radius=radius, radius_t=radius_t),
        data=data,
        loss=LossWeights(target=1.0, prediction=0.5, attention=0.02),
        steps=120,
        batch_size=4,
        rate=1.5e-3,
        warmup=10,
        decay=0.5,
        text_length=16,
        save_every=30,
    )


PRESETS = {"clear_flux_official": clear_flux_official, "tiny": tiny, "tiny_video": tiny_video}


def preset(name: str) -> DistillConfig:
    """A preset by its name; `ValueError` for one that there is not."""
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}; known: {', '.join(sorted(PRESETS))}")
    return PRESETS[name]()


def from_dict(values: dict[str, Any], base: DistillConfig | None = None) -> DistillConfig:
    """A config from plain values or texts, the rest from `base`; `ValueError` for names unknown or missing."""
    known([field.name for field in dataclasses.fields(DistillConfig)], values, "field", " of a distillation config")
    former = base.to_dict() if base is not None else {}
    merged = {**former, **values}
    if isinstance(merged.get("drawn"), dict) and base is not None:
        merged["drawn"] = {**former["drawn"], **merged["drawn"]}
    for name in ("loss", "mechanism"):
        part = merged.get(name)
        if isinstance(part, dict) and base is not None:
            same = "type" not in part or part["type"] == former[name].get("type")
            merged[name] = {**former[name], **part} if same else part
    if isinstance(merged.get("mechanism"), dict):
        merged["mechanism"] = mechanisms.from_dict(merged["mechanism"])
    if isinstance(merged.get("loss"), dict):
        known([field.name for field in dataclasses.fields(LossWeights)], merged["loss"], "loss")
        merged["loss"] = LossWeights(**merged["loss"])
    missing = [name for name in ("model", "mechanism") if name not in merged]
    if missing:
        raise ValueError(f"a distillation config needs {' and '.join(missing)}; start from a preset, or add them")
    single = {name: (merged[name],) for name in ("trackers", "sheet_prompts") if type(merged.get(name)) is str}
    return DistillConfig(**{**merged, **single})


def read_config(path: str | Path, base: DistillConfig | None = None) -> DistillConfig:
    """A config from a JSON or TOML file, over `base`; `ValueError` where that cannot be read, or is no config."""
    return from_dict(read_table(path), base)


def override(config: DistillConfig, options: Iterable[str]) -> DistillConfig:
    """`NAME=VALUE` texts over a config; `mechanism.radius=2` and `loss.attention=0` reach inside.

    Raises `ValueError` for texts of another form, unknown names and values that do not fit.
    """
    changes: dict[str, Any] = {}
    for option in options:
        name, equals, text = option.partition("=")
        if not equals:
            raise ValueError(f"an override is NAME=VALUE, such as steps=500, got {option!r}")
        outer, dot, inner = name.strip().partition(".")
        value: Any = Text(text.strip())
        if outer == "mechanism" and not dot:
            value = {"type": str(value)}
        former = changes.get(outer)
        changes[outer] = {**(former if isinstance(former, dict) else {}), inner: value} if dot else value
    return from_dict(changes, config)
