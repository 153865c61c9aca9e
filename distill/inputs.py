"""From noised latents to the arguments of a model's forward, and from its answer back to latents; one row a family."""

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from .objective import Noised

Arguments = dict[str, Any]


@dataclass(frozen=True)
class Inputs:
    """One row: how a model takes latents, and gives its prediction."""

    models: tuple[str, ...]
    """Class names, subclasses included."""
    arguments: Callable[[Any, Noised, dict[str, Tensor], float | None], Arguments]
    """Model, noised batch, conditioning and guidance -> keyword arguments of its forward."""
    prediction: Callable[[Tensor, Tensor], Tensor] = lambda output, latents: output
    """The model's first output and the latents -> the prediction, of the latents' shape."""


def pack(latents: Tensor) -> Tensor:
    """Flux's tokens: (b, c, 2 h, 2 w) -> (b, h w, 4 c), a token's features ordered (channel, row, column)."""
    return nn.functional.pixel_unshuffle(latents, 2).flatten(2).transpose(1, 2)


def unpack(tokens: Tensor, latents: Tensor) -> Tensor:
    """Undo `pack`, to the shape of `latents`."""
    height, width = latents.shape[-2] // 2, latents.shape[-1] // 2
    return nn.functional.pixel_shuffle(tokens.transpose(1, 2).unflatten(2, (height, width)), 2)


def _flux(model: Any, noised: Noised, conditioning: dict[str, Tensor], guidance: float | None) -> Arguments:
    batch, _, height, width = noised.latents.shape
    if height % 2 or width % 2:
        raise ValueError(f"Flux takes latents in patches of 2 x 2, got {height} x {width}")
    device = noised.latents.device
    rows, columns = torch.meshgrid(torch.arange(height // 2), torch.arange(width // 2), indexing="ij")
    places = torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).flatten(0, 1)
    text = conditioning["encoder_hidden_states"]
    arguments = {
        **conditioning,
        "hidden_states": pack(noised.latents),
        "timestep": noised.timestep / 1000,
        "img_ids": places.to(device, torch.float32),
        "txt_ids": torch.zeros(text.shape[1], 3, device=device),
    }
    if model.config.guidance_embeds:
        arguments["guidance"] = torch.full((batch,), 1.0 if guidance is None else guidance, device=device)
    return arguments


def _plain(model: Any, noised: Noised, conditioning: dict[str, Tensor], guidance: float | None) -> Arguments:
    return {**conditioning, "hidden_states": noised.latents, "timestep": noised.timestep}


def _cogvideox(model: Any, noised: Noised, conditioning: dict[str, Tensor], guidance: float | None) -> Arguments:
    frames, patch = noised.latents.shape[2], model.config.patch_size_t or 1
    if frames % patch:
        raise ValueError(f"{type(model).__name__} takes latents in patches of {patch} frames, got {frames}")
    arguments: Arguments = {
        **conditioning,
        "hidden_states": noised.latents.transpose(1, 2),
        "timestep": noised.timestep,
    }
    if model.config.use_rotary_positional_embeddings:
        arguments["image_rotary_emb"] = _rotations(model, noised.latents)
    return arguments


def _rotations(model: Any, latents: Tensor) -> tuple[Tensor, Tensor]:
    """CogVideoX's rotary embedding for latents (b, c, f, h, w), by its pipeline: without, it would see no positions."""
    from diffusers import CogVideoXPipeline

    frames, height, width = latents.shape[2:]
    # The method asks for pixels and divides them by the VAE's reduction; these are latent cells.
    pipe = SimpleNamespace(transformer=model, vae_scale_factor_spatial=1)
    rotations: tuple[Tensor, Tensor] = CogVideoXPipeline._prepare_rotary_positional_embeddings(
        pipe, height, width, frames, latents.device
    )
    return rotations


def _pixart(model: Any, noised: Noised, conditioning: dict[str, Tensor], guidance: float | None) -> Arguments:
    sizes = {name: conditioning.get(name) for name in ("resolution", "aspect_ratio")}
    given = {name: value for name, value in conditioning.items() if name not in sizes}
    return {"added_cond_kwargs": sizes, **_plain(model, noised, given, guidance)}


def _unet(model: Any, noised: Noised, conditioning: dict[str, Tensor], guidance: float | None) -> Arguments:
    added = {name: conditioning[name] for name in ("text_embeds", "time_ids") if name in conditioning}
    given = {name: value for name, value in conditioning.items() if name not in added}
    if added:  # SDXL
        given["added_cond_kwargs"] = added  # type: ignore[assignment]
    return {**given, "sample": noised.latents, "timestep": noised.timestep}


def _without_variance(output: Tensor, latents: Tensor) -> Tensor:
    """Models that learn the variance answer with twice the channels."""
    return output[:, : latents.shape[1]]


INPUTS: list[Inputs] = [
    Inputs(("FluxTransformer2DModel",), _flux, unpack),
    Inputs(("SD3Transformer2DModel", "WanTransformer3DModel"), _plain),
    Inputs(("CogVideoXTransformer3DModel",), _cogvideox, lambda output, latents: output.transpose(1, 2)),
    Inputs(("PixArtTransformer2DModel",), _pixart, _without_variance),
    Inputs(("UNet2DConditionModel",), _unet),
]
"""Families that can be distilled; `INPUTS.append(Inputs(...))` adds one."""


def inputs_of(model: nn.Module) -> Inputs:
    """The row of a model, by the names of its class and base classes; unknown ones raise `ValueError`."""
    names = {cls.__name__ for cls in type(model).__mro__}
    for row in INPUTS:
        if names & set(row.models):
            return row
    known = ", ".join(name for row in INPUTS for name in row.models)
    raise ValueError(
        f"{type(model).__name__} cannot be distilled yet; known: {known}. One row in diffattn.distill.inputs adds it"
    )


def predict(model: nn.Module, noised: Noised, conditioning: dict[str, Tensor], guidance: float | None) -> Tensor:
    """A forward of `model` (or of what wraps it), as a prediction of the latents' shape."""
    inner: nn.Module = model.module if hasattr(model, "module") else model  # type: ignore[assignment]
    row = inputs_of(inner)
    output = model(**row.arguments(inner, noised, conditioning, guidance), return_dict=False)[0]
    return row.prediction(output, noised.latents)
