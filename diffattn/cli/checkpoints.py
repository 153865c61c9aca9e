"""Find and open what the command line calls a model: a bundled pipeline, a local folder or a hub id."""

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from ..grid import TokenGrid
from ..measure.estimate import Estimate, estimate
from ..measure.estimate.sizes import assume_grid, pixels_per_token
from ..mechanisms.base import Mechanism
from ..swap.apply import apply
from ..swap.plan import COMPONENTS
from ..swap.report import Summary, summary

BUNDLED = "tiny"


def locate(source: str) -> str:
    """`tiny` or `tiny:flux` as the bundled pipeline's folder; folders and hub ids as they are.

    Raises `ValueError` for a folder that does not exist.
    """
    name, _, which = source.partition(":")
    if name == BUNDLED and not Path(source).exists():
        from .. import tiny

        return str(tiny.path(which or "flux"))
    if not source or (not Path(source).exists() and not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", source)):
        raise ValueError(f"no folder {source!r}, and a hub id has the form owner/name; the bundled pipeline is 'tiny'")
    return source


def native_call(source: str) -> dict[str, Any]:
    """The arguments that a bundled pipeline was trained for; none for others."""
    name, _, which = source.partition(":")
    if name != BUNDLED or Path(source).exists():
        return {}
    from .. import tiny

    return dict(tiny.defaults(which or "flux"))


def open_pipeline(source: str, *, device: torch.device, dtype: torch.dtype, offload: bool = False) -> Any:
    """`DiffusionPipeline.from_pretrained`, on its device; with `offload` its models go there one at a time."""
    from diffusers import DiffusionPipeline

    folder = locate(source)
    check_pipeline(folder)
    try:
        pipe = DiffusionPipeline.from_pretrained(folder, dtype=dtype)
    except (OSError, ValueError, RuntimeError, AttributeError, ImportError) as error:
        raise ValueError(f"cannot load {source!r}: {_first_line(error)}") from error
    if offload:
        pipe.enable_model_cpu_offload(device=device)
        return pipe
    return pipe.to(device)


def check_pipeline(folder: str) -> None:
    """Raise `ValueError` for a local folder, or file, that is not of a pipeline; hub ids pass."""
    if not Path(folder).exists():
        return
    index = Path(folder) / "model_index.json"
    what = f"the folder of a pipeline, with a model_index.json that names its class; got {folder}"
    try:
        found = json.loads(index.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = "which has none" if isinstance(error, OSError) else f"whose file is broken: {error}"
        raise ValueError(f"expected {what}, {reason}; name another") from error
    if not isinstance(found, dict) or not isinstance(found.get("_class_name"), (str, list)):
        raise ValueError(f"expected {what}, whose file names none; name another")


def skeletons(source: str) -> dict[str, nn.Module]:
    """The models of a checkpoint that `apply` takes, built from their configs without weights."""
    import diffusers
    from accelerate import init_empty_weights

    folder, models = locate(source), {}
    for name, (class_name, config) in _model_configs(folder, source).items():
        with init_empty_weights():
            models[name] = getattr(diffusers, class_name).from_config(config)
    return models


def _model_configs(folder: str, source: str) -> dict[str, tuple[str, dict[str, Any]]]:
    """Component -> class name and config; of a single model under the name "model"."""
    from diffusers import AutoModel, DiffusionPipeline

    try:
        if Path(folder).is_dir() and not (Path(folder) / "model_index.json").is_file():
            config = AutoModel.load_config(folder)
            return {"model": (config["_class_name"], config)}
        check_pipeline(folder)
        index = DiffusionPipeline.load_config(folder)
        found = {}
        for name in COMPONENTS:
            if isinstance(index.get(name), list) and index[name][0] == "diffusers":
                found[name] = (index[name][1], AutoModel.load_config(folder, subfolder=name))
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"cannot read the configs of {source!r}: {_first_line(error)}") from error
    if not found:
        raise ValueError(f"{source!r} has none of {', '.join(COMPONENTS)}")
    return found


@dataclass(frozen=True)
class Skeleton:
    """A pipeline without weights, for what reads its configs alone."""

    components: dict[str, nn.Module]
    vae: Any
    pipeline: type | None
    """Its class; None for the folder of a single model."""

    @classmethod
    def of(cls, source: str) -> "Skeleton":
        """Of a checkpoint."""
        import diffusers
        from diffusers import DiffusionPipeline

        folder, models = locate(source), skeletons(source)
        if "model" in models:
            return cls({"transformer": models["model"]}, SimpleNamespace(config={}), None)
        name = DiffusionPipeline.load_config(folder)["_class_name"]
        return cls(models, SimpleNamespace(config=vae_config(folder)), getattr(diffusers, name, None))


def estimates(
    source: str,
    *,
    mechanism: Mechanism | str,
    device: torch.device,
    dtype: torch.dtype,
    height: int | None,
    width: int | None,
    card: str | None,
    **options: Any,
) -> list[Estimate]:
    """`diffattn.estimate` for a checkpoint: with its weights on this machine, without them for a `card`."""
    native = native_call(source)
    size = {"height": height or native.get("height", 1024), "width": width or native.get("width", 1024)}
    if options.get("text_tokens") is None:
        options["text_tokens"] = native.get("max_sequence_length")
    target = Skeleton.of(source) if card is not None else open_pipeline(source, device=device, dtype=dtype)
    return estimate(target, mechanism, card=card, **size, **options)


def vae_config(folder: str) -> dict[str, Any]:
    from diffusers import AutoModel

    if Path(folder).is_dir() and not (Path(folder) / "vae").is_dir():
        return {}
    try:
        return dict(AutoModel.load_config(folder, subfolder="vae"))
    except OSError:
        return {}


@dataclass(frozen=True)
class Part:
    """What a swap would do to one model of a checkpoint."""

    name: str
    grid: TokenGrid
    summary: Summary

    @property
    def text(self) -> str:
        return f"{self.name}, finest grid {self.grid} tokens\n{self.summary}"

    def to_dict(self) -> dict[str, Any]:
        rows = [{**asdict(row), "grid": None if row.grid is None else str(row.grid)} for row in self.summary.rows]
        return {"component": self.name, "grid": str(self.grid), "attention_share": self.summary.share, "layers": rows}


def summarize(
    source: str,
    mechanism: Mechanism,
    layers: Sequence[str] | None = None,
    height: int | None = None,
    width: int | None = None,
    frames: int = 1,
    text_tokens: int = 0,
    like: torch.Tensor | None = None,
) -> list[Part]:
    """Every attention layer under `mechanism` and its cost for an image of this size in pixels, without weights.

    The size defaults to that of a bundled pipeline, else 1024. `like` has the device and dtype it would run with.
    """
    native = native_call(source)
    height, width = height or native.get("height", 1024), width or native.get("width", 1024)
    parts, vae = [], vae_config(locate(source))
    for name, model in skeletons(source).items():
        pixels = pixels_per_token(model, vae)
        if height % pixels or width % pixels:
            raise ValueError(
                f"a token of {name} is {pixels} x {pixels} pixels, which does not divide {height} x {width}"
            )
        grid = TokenGrid(height // pixels, width // pixels, frames, before=text_tokens)
        with apply(model, mechanism, layers=layers) as handle:
            assume_grid(model, handle, grid, torch.empty(0) if like is None else like)
            parts.append(Part(name, grid, summary(model)))
    return parts


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]
