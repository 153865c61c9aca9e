"""Arguments for one forward of a model at a size, without a pipeline: shapes are what counts, values are zeros.

One function for each kind of forward; what a class needs is read from its config.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from ...grid import TokenGrid


@dataclass(frozen=True)
class Call:
    """What a forward is made of: cells, text, samples, and where its tensors are."""

    model: nn.Module
    grid: TokenGrid
    text: int
    batch: int
    like: Tensor

    @property
    def config(self) -> Any:
        """Of the model."""
        return self.model.config

    def zeros(self, *shape: int) -> Tensor:
        """`(batch, *shape)`."""
        return self.like.new_zeros(self.batch, *shape)

    def positions(self, axes: int) -> Tensor:
        """Of the cells, row by row, behind a first axis of zeros: `(cells, axes)`, without a batch."""
        rows, columns = (torch.arange(side, device=self.like.device) for side in (self.grid.height, self.grid.width))
        ids = self.like.new_zeros(self.grid.height, self.grid.width, axes)
        ids[..., 1], ids[..., 2] = rows[:, None].to(ids), columns.to(ids)
        return ids.flatten(0, 1)

    @property
    def timestep(self) -> Tensor:
        """One of each sample."""
        return self.like.new_zeros(self.batch)

    def latents(self, channels: int, patch: int, patch_t: int | None = None) -> Tensor:
        """`(batch, channels, [frames,] rows, columns)`."""
        sides = self.grid.height * patch, self.grid.width * patch
        return (
            self.zeros(channels, *sides)
            if patch_t is None
            else self.zeros(channels, self.grid.frames * patch_t, *sides)
        )


def _flux(call: Call) -> dict[str, Any]:
    config, axes = call.config, len(call.config.axes_dims_rope)
    made = {
        "hidden_states": call.zeros(call.grid.cells, config.in_channels),
        "encoder_hidden_states": call.zeros(call.text, config.joint_attention_dim),
        "timestep": call.timestep,
        "img_ids": call.positions(axes),
        "txt_ids": call.like.new_zeros(call.text, axes),
    }
    if "pooled_projection_dim" in config:
        made["pooled_projections"] = call.zeros(config.pooled_projection_dim)
    return made | ({"guidance": call.timestep} if config.guidance_embeds else {})


def _sd3(call: Call) -> dict[str, Any]:
    config = call.config
    return {
        "hidden_states": call.latents(config.in_channels, config.patch_size),
        "encoder_hidden_states": call.zeros(call.text, config.joint_attention_dim),
        "pooled_projections": call.zeros(config.pooled_projection_dim),
        "timestep": call.timestep,
    }


def _qwen_image(call: Call) -> dict[str, Any]:
    config, grid = call.config, call.grid
    layered = {"additional_t_cond": torch.zeros(call.batch, dtype=torch.long, device=call.timestep.device)}
    return {
        "hidden_states": call.zeros(grid.cells, config.in_channels),
        "encoder_hidden_states": call.zeros(call.text, config.joint_attention_dim),
        "timestep": call.timestep,
        "img_shapes": [[(grid.frames, grid.height, grid.width)]] * call.batch,
        **(layered if config.get("use_additional_t_cond") else {}),
    }


def _pixart(call: Call) -> dict[str, Any]:
    config = call.config
    return {
        "hidden_states": call.latents(config.in_channels, config.patch_size),
        "encoder_hidden_states": call.zeros(call.text, config.caption_channels),
        "timestep": call.timestep,
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }


def _wan(call: Call) -> dict[str, Any]:
    config = call.config
    frames, rows, _ = config.patch_size
    return {
        "hidden_states": call.latents(config.in_channels, rows, frames),
        "encoder_hidden_states": call.zeros(call.text, config.text_dim),
        "timestep": call.timestep,
    }


def _hunyuan_video(call: Call) -> dict[str, Any]:
    config = call.config
    made = {
        "hidden_states": call.latents(config.in_channels, config.patch_size, config.patch_size_t),
        "encoder_hidden_states": call.zeros(call.text, config.text_embed_dim),
        "encoder_attention_mask": ~call.zeros(call.text).bool(),
        "pooled_projections": call.zeros(config.pooled_projection_dim),
        "timestep": call.timestep,
    }
    return made | ({"guidance": call.timestep} if config.guidance_embeds else {})


def _ltx(call: Call) -> dict[str, Any]:
    config, grid = call.config, call.grid
    return {
        "hidden_states": call.zeros(grid.cells, config.in_channels),
        "encoder_hidden_states": call.zeros(call.text, config.caption_channels),
        "encoder_attention_mask": call.zeros(call.text),
        "timestep": call.timestep,
        "num_frames": grid.frames,
        "height": grid.height,
        "width": grid.width,
    }


def _unet(call: Call) -> dict[str, Any]:
    """Frames are samples of a UNet's batch in AnimateDiff, and an axis of their own in UNet3D."""
    config, frames = call.config, call.grid.frames
    motion, video = "motion_max_seq_length" in config, "temp_convs" in dir(getattr(call.model, "mid_block", None))
    sample = call.latents(config.in_channels, 1, 1 if motion or video else None)
    samples = call.batch * frames if motion else call.batch
    text = call.like.new_zeros(samples, call.text, _widest(config.cross_attention_dim))
    made: dict[str, Any] = {"sample": sample, "timestep": 1, "encoder_hidden_states": text}
    if config.get("addition_embed_type") == "text_time":
        width = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        made["added_cond_kwargs"] = {"text_embeds": call.zeros(width), "time_ids": call.zeros(6)}
    return made


def _widest(width: Any) -> int:
    return int(max(width)) if isinstance(width, (tuple, list)) else int(width)


@dataclass(frozen=True)
class Kind:
    """How the forward of a class is called."""

    make: Callable[[Call], dict[str, Any]]
    text: int
    """Tokens of text where nobody says how many: those of its pipeline's default."""
    joint: bool = False
    """Is the text among the tokens of its self-attention?"""
    vae: Mapping[str, Any] = field(default_factory=dict)
    """Of the usual VAE's config, what tells the pixels and frames of a token: for a model without its pipeline."""


def _video(space: int, time: int) -> Mapping[str, Any]:
    return MappingProxyType({"spatial_compression_ratio": space, "temporal_compression_ratio": time})


def _packed(channels: int) -> Mapping[str, Any]:
    return MappingProxyType({"latent_channels": channels})


KINDS: Mapping[str, Kind] = MappingProxyType(
    {
        "FluxTransformer2DModel": Kind(_flux, 512, joint=True, vae=_packed(16)),
        "Flux2Transformer2DModel": Kind(_flux, 512, joint=True, vae=_packed(32)),
        "SD3Transformer2DModel": Kind(_sd3, 333, joint=True),
        "QwenImageTransformer2DModel": Kind(_qwen_image, 128, joint=True, vae=_packed(16)),
        "PixArtTransformer2DModel": Kind(_pixart, 300),
        "WanTransformer3DModel": Kind(_wan, 512, vae=_video(8, 4)),
        "HunyuanVideoTransformer3DModel": Kind(_hunyuan_video, 256, joint=True, vae=_video(8, 4)),
        "LTXVideoTransformer3DModel": Kind(_ltx, 128, vae=_video(32, 8)),
        "UNet2DConditionModel": Kind(_unet, 77),
        "UNetMotionModel": Kind(_unet, 77),
        "UNet3DConditionModel": Kind(_unet, 77),
    }
)


def kind_of(model: nn.Module) -> Kind:
    """The row of a model's class; raises `ValueError` where there is none."""
    name = type(model).__name__
    if name not in KINDS:
        raise ValueError(f"expected a model whose inputs are known, one of {', '.join(KINDS)}; got {name}")
    return KINDS[name]


def make_inputs(model: nn.Module, grid: TokenGrid, text: int, batch: int, like: Tensor) -> dict[str, Any]:
    """Arguments of `model`'s forward for `batch` samples of `grid`'s cells and `text` tokens, on `like`'s device."""
    made = kind_of(model).make(Call(model, grid, text, batch, like))
    known = inspect.signature(type(model).forward).parameters
    return {key: value for key, value in made.items() if key in known}
