"""What a run loads of its pipeline: all of it, or the model and the scheduler alone where samples come from a cache."""

from pathlib import Path
from typing import Any

import torch

import diffattn
from diffattn.swap.plan import COMPONENTS

from .config import DistillConfig
from .encoders import Facts, vae_facts

TINY, SHAPES = "tiny", "shapes"


def is_cached(config: DistillConfig) -> bool:
    """Whether the samples are a cache, for which VAE and text encoders need not be loaded."""
    return config.data not in ("", SHAPES)


def source_of(config: DistillConfig) -> str | Path:
    """What diffusers loads the pipeline from."""
    return diffattn.tiny.path("flux") if config.model == TINY else config.model


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
    parts = [name for name, said in pipeline_index(config).items() if isinstance(said, list)]
    return [name for name in parts if name not in (*COMPONENTS, "scheduler")]


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
