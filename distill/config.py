"""The whole of a distillation run as one frozen config: presets are functions, files and overrides change fields.

config = tiny()
config = read_config("run.toml", base=config)          # or JSON; unknown fields raise
config = override(config, ["steps=500", "mechanism.radius=2", "loss.attention=0"])
"""

import ast
import dataclasses
import json
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from diffattn import ClearAttention
from diffattn import config as mechanisms
from diffattn.mechanisms import Mechanism

from .losses import LossWeights

OPTIMIZERS = ("adamw", "prodigy")
PRECISIONS = ("no", "bf16", "fp16")
TRACKERS = ("tensorboard", "wandb", "trackio")


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """One run. Batches are counted over all processes and accumulated parts."""

    model: str
    """Hub id or folder of a diffusers pipeline; `tiny` is the bundled one."""
    mechanism: Mechanism
    """What the student's attention becomes."""
    data: str = ""
    """Folder of cached samples (`diffattn distill cache`); `shapes` is the bundled pipeline's own world."""
    trainable: Literal["projections", "lora", "mechanism"] = "projections"
    lora_rank: int = 16
    backend: str = "auto"
    """Kernel of the mechanism; it must have gradients."""
    layers: str | None = None
    """Glob on the layers that are swapped; None: all that the mechanism takes."""
    loss: LossWeights = field(default_factory=LossWeights)
    attention_layers: str = "*"
    """Glob on the swapped layers among which the attention loss chooses."""
    attention_depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    """Its layers as fractions of the depth, 0 the first and 1 the last of those."""
    steps: int = 10_000
    batch_size: int = 32
    accumulation: int = 1
    """Parts of a process's share of a batch that are computed one after the other."""
    optimizer: Literal["adamw", "prodigy"] = "adamw"
    rate: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 1e-4
    warmup: int = 0
    """Steps over which the rate rises from 0."""
    decay: float = 0.0
    """Share of the steps, at the end, over which it falls to 0."""
    clip: float = 1.0
    """Largest norm of all gradients together; 0 for no limit."""
    ema: float = 0.0
    """Decay of the averaged weights that are exported; 0 for none."""
    precision: Literal["no", "bf16", "fp16"] = "no"
    gradient_checkpointing: bool = False
    sharded: bool = False
    """Split the weights over the processes (`fully_shard`) instead of holding a copy in each."""
    guidance: float | None = None
    """Guidance that a guidance-distilled model is given in training."""
    text_length: int | None = None
    """Text tokens; None: the pipeline's own."""
    save_every: int = 500
    keep: int = 2
    """Checkpoints that are kept."""
    sheet_every: int = 0
    """Steps between sheets of pictures, teacher beside student; 0 for none."""
    sheet_prompts: tuple[str, ...] = ()
    """Their prompts; of the bundled world's own where there are none."""
    trackers: tuple[str, ...] = ()
    """Where losses and sheets are reported beside `log.csv`: tensorboard, wandb, trackio."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulation", "save_every", "keep", "lora_rank"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
        for name in ("warmup", "seed", "sheet_every"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 0:
                raise ValueError(f"{name} must be an integer of at least 0, got {value!r}")
        if self.batch_size % self.accumulation:
            raise ValueError(f"batch_size={self.batch_size} does not split into accumulation={self.accumulation} parts")
        if not self.rate > 0:
            raise ValueError(f"rate must be positive, got {self.rate!r}")
        for name in ("decay", "ema"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in 0 ... 1, got {getattr(self, name)!r}")
        if self.clip < 0:
            raise ValueError(f"clip must be 0 or more, got {self.clip!r}")
        for name, known in (("optimizer", OPTIMIZERS), ("precision", PRECISIONS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")
        for name in self.trackers:
            if name not in TRACKERS:
                raise ValueError(f"trackers are among {', '.join(TRACKERS)}, got {name!r}")
        if self.mechanism.exact:
            raise ValueError(f"{self.mechanism} is the teacher's own attention: nothing is to be distilled")

    def rate_at(self, step: int) -> float:
        """The learning rate of a step, from 0."""
        rising = (step + 1) / self.warmup if self.warmup else 1.0
        falling = (self.steps - step) / (self.decay * self.steps) if self.decay else 1.0
        return self.rate * min(1.0, rising, falling)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON; `from_dict` undoes it."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {**values, "mechanism": self.mechanism.to_dict(), "loss": dataclasses.asdict(self.loss)}


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
    """The bundled pipeline on two CPU cores, in minutes: 256 picture tokens, a disc of 45 of them."""
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


PRESETS = {"clear_flux_official": clear_flux_official, "tiny": tiny}


def preset(name: str) -> DistillConfig:
    """A preset by its name."""
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}; known: {', '.join(sorted(PRESETS))}")
    return PRESETS[name]()


def from_dict(values: dict[str, Any], base: DistillConfig | None = None) -> DistillConfig:
    """A config from plain values, those that are missing from `base`; unknown names raise."""
    known = {f.name: f for f in dataclasses.fields(DistillConfig)}
    for name in values:
        if name not in known:
            raise ValueError(f"unknown field {name!r} of a distillation config; known: {', '.join(known)}")
    merged = {**(base.to_dict() if base is not None else {}), **values}
    for name in ("loss", "mechanism"):
        part = merged.get(name)
        if isinstance(part, dict) and base is not None:
            same = "type" not in part or part["type"] == base.to_dict()[name].get("type")
            merged[name] = {**base.to_dict()[name], **part} if same else part
    if isinstance(merged.get("mechanism"), dict):
        merged["mechanism"] = mechanisms.from_dict(merged["mechanism"])
    if isinstance(merged.get("loss"), dict):
        unknown = set(merged["loss"]) - {f.name for f in dataclasses.fields(LossWeights)}
        if unknown:
            raise ValueError(f"unknown loss {sorted(unknown)[0]!r}; known: target, prediction, attention")
        merged["loss"] = LossWeights(**merged["loss"])
    missing = [name for name in ("model", "mechanism") if name not in merged]
    if missing:
        raise ValueError(f"a distillation config needs {' and '.join(missing)}; start from a preset, or add them")
    tuples = {name: tuple(value) for name, value in merged.items() if isinstance(value, list)}
    tuples |= {name: (merged[name],) for name in ("trackers", "sheet_prompts") if isinstance(merged.get(name), str)}
    return DistillConfig(**{**merged, **tuples})


def read_config(path: str | Path, base: DistillConfig | None = None) -> DistillConfig:
    """A config from a JSON or TOML file, over `base`."""
    path = Path(path)
    try:
        text = path.read_text()
        values = tomllib.loads(text) if path.suffix == ".toml" else json.loads(text)
    except FileNotFoundError as error:
        raise ValueError(f"there is no config file {path}") from error
    except (tomllib.TOMLDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not valid {'TOML' if path.suffix == '.toml' else 'JSON'}: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold one table of fields, got {type(values).__name__}")
    return from_dict(values, base)


def override(config: DistillConfig, options: Iterable[str]) -> DistillConfig:
    """`NAME=VALUE` texts over a config; `mechanism.radius=2` and `loss.attention=0` reach inside."""
    changes: dict[str, Any] = {}
    for option in options:
        name, equals, text = option.partition("=")
        if not equals:
            raise ValueError(f"an override is NAME=VALUE, such as steps=500, got {option!r}")
        outer, dot, inner = name.strip().partition(".")
        try:
            value = ast.literal_eval(text.strip())
        except (SyntaxError, ValueError):
            value = text.strip()
        if outer == "mechanism" and not dot:
            value = {"type": value} if isinstance(value, str) else value
        former = changes.get(outer)
        changes[outer] = {**(former if isinstance(former, dict) else {}), inner: value} if dot else value
    return from_dict(changes, config)
