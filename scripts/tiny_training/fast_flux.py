"""The Flux transformer's forward pass, arranged to train quickly on a CPU at two fixed sizes.

It computes what `FluxTransformer2DModel.forward` computes, with rotary tables made once. The blocks run in bfloat16
under autocast, attention is two matrix products around a softmax (faster to differentiate on a CPU than the fused
kernel), and time and latents enter in float32 so that no timestep is rounded.
"""

import math

import torch
from diffusers import FluxTransformer2DModel
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn
from torch.nn import functional

from tiny_training.components import LATENT_SIDE
from tiny_training.text import MAX_TOKENS


class TrainingAttention:
    """Attention processor of both kinds of Flux block, for training without a mask."""

    _attention_backend = None
    _parallel_config = None

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Joint attention over (batch, tokens, channels); text tokens come first."""
        if image_rotary_emb is None:
            raise ValueError("expected rotary tables; got None; call the block as FastFlux does")
        split = (-1, attn.head_dim)
        query = normalise(attn.norm_q, attn.to_q(hidden_states).unflatten(-1, split))
        key = normalise(attn.norm_k, attn.to_k(hidden_states).unflatten(-1, split))
        value = attn.to_v(hidden_states).unflatten(-1, split)
        if encoder_hidden_states is not None:
            text = encoder_hidden_states
            text_query = normalise(attn.norm_added_q, attn.add_q_proj(text).unflatten(-1, split))
            text_key = normalise(attn.norm_added_k, attn.add_k_proj(text).unflatten(-1, split))
            query = torch.cat([text_query, query], dim=1)
            key = torch.cat([text_key, key], dim=1)
            value = torch.cat([attn.add_v_proj(text).unflatten(-1, split), value], dim=1)
        query = rotate(query, image_rotary_emb).transpose(1, 2) * attn.head_dim**-0.5
        key = rotate(key, image_rotary_emb).transpose(1, 2)
        scores = query.to(value.dtype) @ key.to(value.dtype).transpose(-1, -2)
        mixed = (scores.softmax(-1).to(value.dtype) @ value.transpose(1, 2)).transpose(1, 2).flatten(2)
        if encoder_hidden_states is None:
            return mixed
        text, image = mixed[:, :MAX_TOKENS], mixed[:, MAX_TOKENS:]
        return attn.to_out[0](image), attn.to_add_out(text)


def normalise(norm: nn.RMSNorm, features: Tensor) -> Tensor:
    """Root-mean-square norm with its weight in the type of `features`, which a fused kernel needs."""
    return functional.rms_norm(features, norm.normalized_shape, norm.weight.to(features.dtype), norm.eps)


def rotate(features: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
    """Turn neighbouring channel pairs of (batch, tokens, heads, channels) by the angles of each token's place."""
    cosine, sine = tables
    even, odd = features.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack((-odd, even), dim=-1).flatten(-2)
    return torch.addcmul(features * cosine, turned, sine)


class FastFlux(nn.Module):
    """Velocity of packed latents, computed with the weights of `transformer`."""

    def __init__(self, transformer: FluxTransformer2DModel) -> None:
        """Keep `transformer` and give its blocks the training attention."""
        super().__init__()
        self.transformer = transformer
        for block in (*transformer.transformer_blocks, *transformer.single_transformer_blocks):
            block.attn.processor = TrainingAttention()
        self.tables = {side: rotary_tables(transformer, side) for side in (LATENT_SIDE // 2, LATENT_SIDE // 4)}

    def forward(self, latents: Tensor, sigma: Tensor, text: Tensor, pooled: Tensor) -> Tensor:
        """Predict noise - data, (batch, image tokens, channels), from latents at noise level `sigma` (batch,)."""
        flux = self.transformer
        image = flux.x_embedder(latents)
        time = flux.time_text_embed(sigma * 1000.0, pooled)
        text = flux.context_embedder(text)
        tables = self.tables[math.isqrt(latents.shape[1])]
        with torch.autocast("cpu", torch.bfloat16):
            image, text, time = image.bfloat16(), text.bfloat16(), time.bfloat16()
            for block in (*flux.transformer_blocks, *flux.single_transformer_blocks):
                text, image = block(hidden_states=image, encoder_hidden_states=text, temb=time, image_rotary_emb=tables)
            return flux.proj_out(flux.norm_out(image, time)).float()


def rotary_tables(transformer: FluxTransformer2DModel, side: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines, bfloat16 (1, tokens, 1, channels), of the text tokens and a `side` x `side` image.

    A smaller image is spread over the native grid, so that a place keeps its coordinates at every size.
    """
    stride = LATENT_SIDE // 2 / side
    line = torch.arange(side) * stride + (stride - 1.0) / 2.0
    places = torch.zeros(MAX_TOKENS + side * side, 3)
    places[MAX_TOKENS:, 1] = line.repeat_interleave(side)
    places[MAX_TOKENS:, 2] = line.repeat(side)
    cosine, sine = transformer.pos_embed(places)
    return cosine[None, :, None].bfloat16(), sine[None, :, None].bfloat16()


def zero_modulation(transformer: FluxTransformer2DModel) -> None:
    """Start every block as the identity and the predicted velocity at zero, which steadies early training."""
    for block in transformer.transformer_blocks:
        nn.init.zeros_(block.norm1.linear.weight)
        nn.init.zeros_(block.norm1_context.linear.weight)
        nn.init.zeros_(block.norm1.linear.bias)
        nn.init.zeros_(block.norm1_context.linear.bias)
    for block in transformer.single_transformer_blocks:
        nn.init.zeros_(block.norm.linear.weight)
        nn.init.zeros_(block.norm.linear.bias)
    for linear in (transformer.norm_out.linear, transformer.proj_out):
        nn.init.zeros_(linear.weight)
        nn.init.zeros_(linear.bias)
