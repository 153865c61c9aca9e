"""How a stock pipeline encodes a caption for its model, and what samples that model takes; one row a family.

Conditioning bears the names under which `inputs.py` hands it to the model's forward, without the batch axis. What
depends on the picture's size alone (SDXL's and PixArt's) is what the pipeline itself passes for an image of that size.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from diffattn.swap.plan import models_of

Facts = dict[str, Any]
Tensors = dict[str, Tensor]
Size = tuple[int, int]
"""Height and width in pixels."""


@dataclass(frozen=True)
class Encoder:
    """One row: text to conditioning, and the facts of a model."""

    models: tuple[str, ...]
    """Class names, subclasses included."""
    text: Callable[[Any, str, int], Tensors]
    """Pipeline, caption and number of text tokens -> conditioning."""
    facts: Callable[[Any], Facts]
    """Model -> `latent_channels`, `text_dim`, `pooled_dim`, and `text_length` where it takes no other."""
    parts: tuple[str, ...] = ("tokenizer", "text_encoder")
    """Of the pipeline, beside the VAE, without which text can't be encoded."""
    by_size: Callable[[Any, Size], dict[str, list[float]]] = lambda model, size: {}
    """Model and image size -> further conditioning, the same for all images of that size."""
    frames: bool = False
    """Latents have an axis of frames, and images one frame."""


def encoder_of(model: nn.Module) -> Encoder:
    """The row of a model, by the names of its class and base classes; unknown ones raise `ValueError`."""
    names = {cls.__name__ for cls in type(model).__mro__}
    for row in ENCODERS:
        if names & set(row.models):
            return row
    known = ", ".join(name for row in ENCODERS for name in row.models)
    raise ValueError(
        f"{type(model).__name__} has no cache yet; known: {known}. One row in diffattn.distill.encoders adds it, or "
        f"give the Trainer a Source of your own, see diffattn.distill.data.samples"
    )


def model_facts(model: Any) -> Facts:
    """What a cache must be like for a model: `expected` of a `CacheSource`."""
    return {"model": type(model).__name__, **encoder_of(model).facts(model)}


def vae_facts(config: Any) -> Facts:
    """What a VAE's config says of its latents: sample = (latent - shift_factor) * scaling_factor, numbers or one for
    each channel."""
    shift = config.get("latents_mean") or config.get("shift_factor") or 0.0
    scale, spread = config.get("scaling_factor") or 1.0, config.get("latents_std")
    return {
        "latent_channels": config.get("latent_channels") or config.get("z_dim"),
        "scaling_factor": [scale / value for value in spread] if spread else scale,
        "shift_factor": list(shift) if isinstance(shift, (tuple, list)) else shift,
    }


def text_length_of(pipe: Any) -> int:
    """Text tokens of a pipeline's own calls."""
    parameter = inspect.signature(type(pipe).__call__).parameters.get("max_sequence_length")
    return int(parameter.default if parameter is not None else pipe.tokenizer.model_max_length)


def model_of(pipe: Any) -> Any:
    """The model that a cache of the pipeline is for; raises `ValueError` where it can't be cached."""
    try:
        found = models_of(pipe)
    except (TypeError, ValueError) as error:
        raise ValueError(f"expected a diffusers pipeline to encode with, got {type(pipe).__name__}: {error}") from error
    model = found[0]
    if any(model_facts(other) != model_facts(model) for other in found[1:]):
        raise ValueError(f"expected models that take the same samples, got {len(found)} that do not: cache for one")
    absent = [part for part in ("vae", *encoder_of(model).parts) if getattr(pipe, part, None) is None]
    if absent:
        raise ValueError(
            f"expected a pipeline with VAE and text encoders, got one without {', '.join(absent)}; load them"
        )
    channels, own = model_facts(model)["latent_channels"], vae_facts(pipe.vae.config)["latent_channels"]
    if channels != own:
        raise ValueError(
            f"expected a model of the VAE's {own} latent channels, got {type(model).__name__} with {channels}: what it "
            f"takes besides the noise, such as an image, a cache does not hold"
        )
    return model


def multiple_of(pipe: Any, model: Any) -> tuple[int, int]:
    """Pixels in a latent cell, and in a token, along a side."""
    cell = int(getattr(pipe, "vae_scale_factor", None) or pipe.vae_scale_factor_spatial)
    if encoder_of(model).models == ("FluxTransformer2DModel",):
        return cell, 2 * cell
    patch = model.config.get("patch_size") or 1
    return cell, cell * (patch[-1] if isinstance(patch, (tuple, list)) else patch)


def check_frames(pipe: Any, frames: int) -> None:
    """Raise `ValueError` for clips that are not whole latent frames."""
    each = frames_of_latent(pipe)
    if frames % each != 1 % each:
        near = [number for number in range(frames - each, frames + each) if number > 1 and number % each == 1]
        raise ValueError(
            f"expected clips of {each} n + 1 frames, as the VAE of {type(pipe).__name__} takes them, got {frames}; ask "
            f"for {' or '.join(map(str, near))}"
        )


def frames_of_latent(pipe: Any) -> int:
    """Frames of a clip that become one latent frame; the first becomes one by itself."""
    return int(getattr(pipe, "vae_scale_factor_temporal", 1))


def latent_frames(pipe: Any, model: Any, frames: int) -> int:
    """Latent frames of a clip of so many frames, with those that fill the last patch."""
    own = (frames - 1) // frames_of_latent(pipe) + 1
    return own + -own % _patch_frames(model)


def whole_patches(model: Any, latents: Tensor) -> Tensor:
    """Latents (c, f, h, w) with the first frame repeated before itself until they are whole patches.

    The patches of CogVideoX 1.5 span two latent frames. Its pipeline draws the missing ones in front, and drops them.
    """
    missing = -latents.shape[1] % _patch_frames(model)
    return torch.cat([latents[:, :1].expand(-1, missing, -1, -1), latents], dim=1)


def _patch_frames(model: Any) -> int:
    """Latent frames in a patch; more than one in CogVideoX 1.5 alone."""
    return int(model.config.get("patch_size_t") or 1)


def _flux_text(pipe: Any, caption: str, length: int) -> Tensors:
    text, pooled, _ = pipe.encode_prompt(prompt=caption, prompt_2=None, max_sequence_length=length)
    return {"encoder_hidden_states": text[0], "pooled_projections": pooled[0]}


def _sd3_text(pipe: Any, caption: str, length: int) -> Tensors:
    text, _, pooled, _ = pipe.encode_prompt(
        caption, None, None, do_classifier_free_guidance=False, max_sequence_length=length
    )
    return {"encoder_hidden_states": text[0], "pooled_projections": pooled[0]}


def _plain_text(pipe: Any, caption: str, length: int) -> Tensors:
    text, _ = pipe.encode_prompt(caption, do_classifier_free_guidance=False, max_sequence_length=length)
    return {"encoder_hidden_states": text[0]}


def _pixart_text(pipe: Any, caption: str, length: int) -> Tensors:
    text, mask, _, _ = pipe.encode_prompt(caption, do_classifier_free_guidance=False, max_sequence_length=length)
    return {"encoder_hidden_states": text[0], "encoder_attention_mask": mask[0]}


def _unet_text(pipe: Any, caption: str, length: int) -> Tensors:
    own = text_length_of(pipe)
    if length != own:
        raise ValueError(
            f"expected {own} text tokens, as {type(pipe).__name__} always takes, got {length}; leave it out"
        )
    if pipe.unet.config.addition_embed_type is None:
        return {"encoder_hidden_states": pipe.encode_prompt(caption, pipe._execution_device, 1, False)[0][0]}
    text, _, pooled, _ = pipe.encode_prompt(caption, do_classifier_free_guidance=False)
    return {"encoder_hidden_states": text[0], "text_embeds": pooled[0]}


def _flux_facts(model: Any) -> Facts:
    size = model.config
    # The transformer's tokens are 2 x 2 latent cells.
    return {
        "latent_channels": size.in_channels // 4,
        "text_dim": size.joint_attention_dim,
        "pooled_dim": size.pooled_projection_dim,
    }


def _sd3_facts(model: Any) -> Facts:
    return {**_flux_facts(model), "latent_channels": model.config.in_channels}


def _facts_by(text_dim: str) -> Callable[[Any], Facts]:
    def facts(model: Any) -> Facts:
        return {
            "latent_channels": model.config.in_channels,
            "text_dim": model.config.get(text_dim),
            "pooled_dim": None,
        }

    return facts


def _cogvideox_facts(model: Any) -> Facts:
    facts = _facts_by("text_embed_dim")(model)
    # Learned and sinusoidal positions are counted from the end of the text.
    fixed = not model.config.use_rotary_positional_embeddings
    return facts | ({"text_length": model.config.max_text_seq_length} if fixed else {})


def _unet_facts(model: Any) -> Facts:
    size = model.config
    if size.addition_embed_type not in (None, "text_time") or size.encoder_hid_dim_type or size.class_embed_type:
        raise ValueError(
            f"expected a UNet conditioned by text alone, as SD 1.5 and SDXL are, got addition_embed_type "
            f"{size.addition_embed_type!r}, encoder_hid_dim_type {size.encoder_hid_dim_type!r}, class_embed_type "
            f"{size.class_embed_type!r}; give the Trainer a Source of your own, see diffattn.distill.data.samples"
        )
    pooled = None
    if size.addition_embed_type is not None:
        pooled = size.projection_class_embeddings_input_dim - 6 * size.addition_time_embed_dim
    return {**_facts_by("cross_attention_dim")(model), "pooled_dim": pooled}


def _pixart_by_size(model: Any, size: Size) -> dict[str, list[float]]:
    if not model.use_additional_conditions:
        return {}
    return {"resolution": list(size), "aspect_ratio": [size[0] / size[1]]}


def _unet_by_size(model: Any, size: Size) -> dict[str, list[float]]:
    """SDXL's original size, corner of the crop, and size, as its pipeline passes them by default."""
    return {} if model.config.addition_embed_type is None else {"time_ids": [*size, 0, 0, *size]}


_CLIP = ("tokenizer", "text_encoder", "tokenizer_2", "text_encoder_2")

ENCODERS: list[Encoder] = [
    Encoder(("FluxTransformer2DModel",), _flux_text, _flux_facts, _CLIP),
    # SD3's third encoder may be left out, which is what its pipeline then does itself.
    Encoder(("SD3Transformer2DModel",), _sd3_text, _sd3_facts, _CLIP),
    Encoder(("WanTransformer3DModel",), _plain_text, _facts_by("text_dim"), frames=True),
    Encoder(("CogVideoXTransformer3DModel",), _plain_text, _cogvideox_facts, frames=True),
    Encoder(("PixArtTransformer2DModel",), _pixart_text, _facts_by("caption_channels"), by_size=_pixart_by_size),
    Encoder(("UNet2DConditionModel",), _unet_text, _unet_facts, by_size=_unet_by_size),
]
"""Families with a cache; `ENCODERS.append(Encoder(...))` adds one."""
