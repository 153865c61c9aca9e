"""What a run loads of its pipeline: all of it, or the model and the scheduler alone where samples come from a cache."""

from pathlib import Path
from typing import Any

import torch

import diffattn
from diffattn.swap.plan import COMPONENTS

from .config import DistillConfig
from .encoders import Facts, vae_facts

TINY = "tiny"
"""`tiny` and `tiny:flux` are the bundled Flux pipeline, `tiny:wan` the bundled Wan pipeline."""
SHAPES, MOVING = "shapes", "moving"
"""Data that is made by formula: the worlds that the bundled Flux and Wan pipelines were trained on."""
WORLDS = {SHAPES: "FluxTransformer2DModel", MOVING: "WanTransformer3DModel"}
"""Models that take them."""


def is_cached(config: DistillConfig) -> bool:
    """Whether the samples are a cache, for which VAE and text encoders need not be loaded."""
    return config.data not in ("", *WORLDS)


def source_of(config: DistillConfig) -> str | Path:
    """What diffusers loads the pipeline from."""
    name = bundled(config.model)
    return config.model if name is None else diffattn.tiny.path(name)


def bundled(model: str) -> str | None:
    """The name that a bundled pipeline has in `diffattn.tiny`; None for all others.

    >>> bundled("tiny"), bundled("tiny:wan"), bundled("owner/name")
    ('flux', 'wan', None)
    """
    name, _, which = model.partition(":")
    return (which or "flux") if name == TINY else None


def native_call(model: str) -> dict[str, Any]:
    """Arguments of a bundled pipeline's call at the size it was trained for; none for others."""
    name = bundled(model)
    return {} if name is None else diffattn.tiny.defaults(name)


def open_pipeline(config: DistillConfig, **parts: Any) -> Any:
    """The pipeline in float32 (trained parts must be), with some parts as they are given, None for none."""
    import diffusers

    # Not DiffusionPipeline itself, which ignores parts that are given for optional places, such as Wan's transformer.
    kind = getattr(diffusers, pipeline_index(config)["_class_name"], diffusers.DiffusionPipeline)
    try:
        return kind.from_pretrained(source_of(config), dtype=torch.float32, **parts)
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot load {config.model!r}: {str(error).splitlines()[0]}") from error


def encoding_parts(config: DistillConfig) -> list[str]:
    """The parts of the pipeline that a cache replaces: all but the models and the scheduler."""
    return [name for name in _parts(config) if name not in (*COMPONENTS, "scheduler")]


def model_parts(config: DistillConfig) -> list[str]:
    """The models of the pipeline that its calls use, by their names there; those of Wan 2.2 are two."""
    parts = [name for name in _parts(config) if name in COMPONENTS]
    never = "transformer_2" in parts and pipeline_index(config).get("boundary_ratio") is None
    return [name for name in parts if not (never and name == "transformer_2")]


def trained_part(config: DistillConfig) -> str | None:
    """The name of the model that is trained; None where the pipeline has but one.

    Raises `ValueError` where the config does not name one of several.
    """
    parts = model_parts(config)
    if config.part is None and len(parts) < 2:
        return None
    if config.part not in parts:
        raise ValueError(
            f"expected part={' or part='.join(parts)} for {config.model!r}, got {config.part}: each model is trained "
            f"by itself"
        )
    return config.part if len(parts) > 1 else None


def other_models(config: DistillConfig, part: str | None) -> list[str]:
    """The models of the pipeline beside `part` (None: the only one that its calls use), which a run does without."""
    kept = part or next(iter(model_parts(config)), None)
    return [name for name in _parts(config) if name in COMPONENTS and name != kept]


def _parts(config: DistillConfig) -> list[str]:
    index = pipeline_index(config)
    return [name for name, said in index.items() if isinstance(said, list) and said[-1] is not None]


def pipeline_index(config: DistillConfig) -> dict[str, Any]:
    """What the pipeline is made of."""
    from diffusers import DiffusionPipeline

    try:
        return dict(DiffusionPipeline.load_config(source_of(config)))
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot load {config.model!r}: {str(error).splitlines()[0]}") from error


def vae_facts_of(config: DistillConfig) -> Facts:
    """What the config of the pipeline's VAE says, without its weights; nothing where there is none."""
    from diffusers import AutoModel

    try:
        return vae_facts(AutoModel.load_config(source_of(config), subfolder="vae"))
    except OSError:
        return {}
