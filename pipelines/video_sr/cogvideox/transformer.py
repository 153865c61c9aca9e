"""The transformer of STAR's CogVideoX variant: stock, with the low-quality clip beside the latents, and gates.

    v = f([x_t, z_lq], t, text)            x_t, z_lq, v: (b, frames, 16, rows, columns)

There is no control branch: both latents enter the patch convolution as 32 channels.
"""

from typing import Any

import torch
from diffattn.pipelines.pixel_aware_sr.networks.signatures import extends
from diffusers import CogVideoXTransformer3DModel, ModelMixin
from diffusers.models.attention_processor import CogVideoXAttnProcessor2_0
from diffusers.models.embeddings import get_3d_rotary_pos_embed
from diffusers.pipelines.cogvideo.pipeline_cogvideox import get_resize_crop_region_for_grid
from torch import Tensor

from .attention import STARCogVideoXAttention

# diffusers looks for the class that knows how to load a component in the component's own module.
__all__ = ["ModelMixin", "STARCogVideoXTransformer3DModel", "rotary_embedding"]

Rotary = tuple[Tensor, Tensor]
"""Cosines and sines (tokens, head_dim) of the picture's tokens."""

_QK_EPS = 1e-6
_FINAL_EPS = 1e-6
"""The official norm before the last projection has this; the stock one has the blocks' 1e-5."""


class STARCogVideoXTransformer3DModel(CogVideoXTransformer3DModel):  # type: ignore[misc]
    """The stock model, `STARCogVideoXAttention` in each block. Takes the stock settings.

    Raises `ValueError` unless `in_channels` is twice `out_channels`, for patches over time (CogVideoX 1.5), and for
    positions that are not rotary.
    """

    @extends(CogVideoXTransformer3DModel)
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        config = self.config
        if config.in_channels != 2 * config.out_channels:
            raise ValueError(
                f"expected in_channels twice as many as out_channels, latents and low-quality latents; got "
                f"{config.in_channels} and {config.out_channels}; 32 and 16 are STAR's"
            )
        if config.patch_size_t is not None or not config.use_rotary_positional_embeddings:
            raise ValueError(
                f"expected no patch_size_t and use_rotary_positional_embeddings=True; got {config.patch_size_t} and "
                f"{config.use_rotary_positional_embeddings}; STAR's model is a CogVideoX-5B"
            )
        for block in self.transformer_blocks:
            block.attn1 = STARCogVideoXAttention(
                query_dim=config.num_attention_heads * config.attention_head_dim,
                heads=config.num_attention_heads,
                dim_head=config.attention_head_dim,
                qk_norm="layer_norm",
                eps=_QK_EPS,
                bias=config.attention_bias,
                processor=CogVideoXAttnProcessor2_0(),
            )
        self.norm_out.norm.eps = _FINAL_EPS

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        timestep: int | float | Tensor,
        timestep_cond: Tensor | None = None,
        ofs: int | float | Tensor | None = None,
        image_rotary_emb: Rotary | None = None,
        attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
    ) -> Any:
        """Velocity (b, frames, 16, rows, columns), in an output as `sample` or a tuple.

        Args:
            hidden_states: latents and low-quality latents, (b, frames, 32, rows, columns).
            encoder_hidden_states: text, (b, tokens, width).
            timestep: (b,).
            timestep_cond: as in the stock model, and so are `ofs` and `attention_kwargs`.
            image_rotary_emb: see `rotary_embedding`. None: that of these sides.

        Raises `ValueError` for another number of channels, and for sides that are no whole number of patches.
        """
        _, frames, channels, height, width = hidden_states.shape
        patch = self.config.patch_size
        if channels != self.config.in_channels or height % patch or width % patch:
            raise ValueError(
                f"expected latents (b, frames, {self.config.in_channels}, rows, columns), rows and columns multiples "
                f"of {patch}; got {tuple(hidden_states.shape)}; join the latents and the low-quality latents, padded"
            )
        if image_rotary_emb is None:
            image_rotary_emb = rotary_embedding(self, frames, height, width, hidden_states.device)
        return super().forward(
            hidden_states,
            encoder_hidden_states,
            timestep,
            timestep_cond=timestep_cond,
            ofs=ofs,
            image_rotary_emb=image_rotary_emb,
            attention_kwargs={**(attention_kwargs or {}), "grid": (frames, height // patch, width // patch)},
            return_dict=return_dict,
        )


def rotary_embedding(model: Any, frames: int, height: int, width: int, device: torch.device | str) -> Rotary:
    """Rotary embedding of latents of any size, as diffusers' CogVideoX pipeline has it.

    Rows and columns are spread over the sides that the model was trained on, with the aspect ratio kept; frames are
    counted from 0.

    Args:
        model: its configuration tells patches, head width and trained sides.
        frames: of the latents; so are `height` and `width`.
    """
    patch = model.config.patch_size
    cells = height // patch, width // patch
    trained = model.config.sample_width // patch, model.config.sample_height // patch
    embedding: Rotary = get_3d_rotary_pos_embed(
        embed_dim=model.config.attention_head_dim,
        crops_coords=get_resize_crop_region_for_grid(cells, *trained),
        grid_size=cells,
        temporal_size=frames,
        device=device,
    )
    return embedding
