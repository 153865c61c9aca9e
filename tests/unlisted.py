"""Tiny random models of classes that `describe` is tried on, and where their tokens lie, by hand."""

from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from models import _COARSE, _FINE, COLUMNS, ROWS, TEXT, TIME, Tiny, Tokens, _make, draw, picture_ids, randomize
from torch import Tensor, nn
from torch.nn import functional as F


def chroma() -> Tiny:
    """Padded text, by a mask over queries and keys."""
    model = _make(
        "ChromaTransformer2DModel",
        in_channels=4,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=12,
        axes_dims_rope=(4, 6, 6),
        approximator_num_channels=8,
        approximator_hidden_dim=16,
        approximator_layers=1,
    )
    cells = ROWS * COLUMNS
    inputs = dict(
        hidden_states=draw(2, cells, 4),
        encoder_hidden_states=draw(2, TEXT, 12),
        timestep=TIME,
        img_ids=picture_ids(),
        txt_ids=torch.zeros(TEXT, 3),
        attention_mask=(torch.arange(TEXT + cells) >= torch.tensor([[0], [2]])),
    )
    return Tiny(model, inputs, {r"(single_)?transformer_blocks\.\d+\.attn": (Tokens(TEXT, 1, ROWS, COLUMNS),)})


def cogview4() -> Tiny:
    model = _make(
        "CogView4Transformer2DModel",
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        text_embed_dim=12,
        time_embed_dim=8,
        condition_dim=4,
    )
    inputs = dict(
        hidden_states=draw(2, 4, 2 * ROWS, 2 * COLUMNS),
        encoder_hidden_states=draw(2, TEXT, 12),
        timestep=torch.tensor([7, 3]),
        original_size=torch.ones(2, 2),
        target_size=torch.ones(2, 2),
        crop_coords=torch.zeros(2, 2),
    )
    return Tiny(model, inputs, {r"transformer_blocks\.\d+\.attn1": (Tokens(TEXT, 1, ROWS, COLUMNS),)})


REGISTERS = 8


def auraflow() -> Tiny:
    """With tokens of its own before the text."""
    model = _make(
        "AuraFlowTransformer2DModel",
        sample_size=32,
        in_channels=4,
        num_mmdit_layers=2,
        num_single_dit_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=12,
        caption_projection_dim=16,
        out_channels=4,
        pos_embed_max_size=256,
    )
    inputs = dict(
        hidden_states=draw(2, 4, 2 * ROWS, 2 * COLUMNS), encoder_hidden_states=draw(2, TEXT, 12), timestep=TIME
    )
    layout = (Tokens(REGISTERS + TEXT, 1, ROWS, COLUMNS),)
    return Tiny(model, inputs, {r"(joint|single)_transformer_blocks\.\d+\.attn": layout})


def latte() -> Tiny:
    """Layers within a frame and along the frames, all of them told by the model's own arguments."""
    model = _make(
        "LatteTransformer3DModel",
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        cross_attention_dim=16,
        attention_bias=True,
        sample_size=16,
        patch_size=2,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        caption_channels=12,
        video_length=5,
    )
    inputs = dict(
        hidden_states=draw(2, 4, 5, 2 * ROWS, 2 * COLUMNS),
        timestep=torch.tensor([7, 3]),
        encoder_hidden_states=draw(2, TEXT, 12),
    )
    within = {r"transformer_blocks\.\d+\.attn1": (Tokens(0, 1, ROWS, COLUMNS),)}
    along = {r"temporal_transformer_blocks\.\d+\.attn1": (Tokens(0, 5, 1, 1),)}
    return Tiny(model, inputs, within, along)


def unet2d() -> Tiny:
    """Layers that are given feature maps themselves."""
    model = _make(
        "UNet2DModel",
        norm_num_groups=4,
        layers_per_block=1,
        block_out_channels=(8, 16),
        down_block_types=("AttnDownBlock2D",) * 2,
        up_block_types=("AttnUpBlock2D",) * 2,
        attention_head_dim=8,
    )
    layouts = {
        r"(down_blocks\.0|up_blocks\.1)\.attentions\.\d+": (_FINE,),
        r"(down_blocks\.1|mid_block|up_blocks\.0)\.attentions\.\d+": (_COARSE,),
    }
    return Tiny(model, dict(sample=draw(2, 3, 8, 12), timestep=torch.tensor([7, 3])), layouts)


def prx() -> Tiny:
    """Asks with the image alone, and answers by text and image."""
    model = _make(
        "PRXTransformer2DModel",
        in_channels=4,
        patch_size=2,
        context_in_dim=12,
        hidden_size=32,
        mlp_ratio=2.0,
        num_heads=2,
        depth=2,
        axes_dim=[8, 8],
    )
    inputs = dict(
        hidden_states=draw(2, 4, 2 * ROWS, 2 * COLUMNS), timestep=TIME, encoder_hidden_states=draw(2, TEXT, 12)
    )
    return Tiny(model, inputs, {})


class Toy(nn.Module):
    """One layer of attention over latents (b, c, height, width)."""

    def __init__(self) -> None:
        super().__init__()
        self.config = {"patch_size": 1}
        self.enter = nn.Linear(4, 16)
        self.attn = Attention(16, heads=2, dim_head=8)
        self.leave = nn.Linear(16, 4)

    def order(self, tokens: Tensor) -> Tensor:
        """The cells (b, height x width, c) as the layer gets them."""
        return tokens

    def forward(self, hidden_states: Tensor) -> Tensor:
        x = self.enter(self.order(hidden_states.flatten(2).transpose(1, 2)))
        return self.leave(x + self.attn(x))


class ColumnByColumn(Toy):
    """Lists its cells column by column."""

    def order(self, tokens: Tensor) -> Tensor:
        return tokens.unflatten(1, (ROWS, COLUMNS)).transpose(1, 2).flatten(1, 2)


class MixedBefore(Toy):
    """Has told every cell of all others before the layer sees them."""

    def order(self, tokens: Tensor) -> Tensor:
        return tokens + tokens.mean(dim=1, keepdim=True)


class PlainLayer(nn.Module):
    """Attention without a processor."""

    def forward(self, x: Tensor) -> Tensor:
        heads = x.unflatten(-1, (2, -1)).transpose(1, 2)
        return F.scaled_dot_product_attention(heads, heads, heads).transpose(1, 2).flatten(2)


class WithoutProcessor(Toy):
    """Its attention layer computes by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = PlainLayer()


def in_a_helper(query: Tensor, **options: Any) -> Tensor:
    return F.scaled_dot_product_attention(query, query, query, **options)


class HelpedProcessor:
    """Attends in a function beside it."""

    def __call__(self, attn: Any, hidden_states: Tensor, **options: Any) -> Tensor:
        heads = hidden_states.unflatten(-1, (2, -1)).transpose(1, 2)
        return in_a_helper(heads).transpose(1, 2).flatten(2)


class CausalProcessor:
    """Attends to what came before."""

    def __call__(self, attn: Any, hidden_states: Tensor, **options: Any) -> Tensor:
        x = hidden_states.unflatten(-1, (2, -1)).transpose(1, 2)
        return F.scaled_dot_product_attention(x, x, x, is_causal=True).transpose(1, 2).flatten(2)


class Tokens3D(Toy):
    """A video (b, frames, height, width, c), text behind it."""

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        x = self.enter(torch.cat([hidden_states.flatten(1, 3), encoder_hidden_states], dim=1))
        return self.leave(x + self.attn(x))


class Listed(Toy):
    """Tokens of an image, listed with those of the text by position ids."""

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, position_ids: Tensor) -> Tensor:
        x = torch.cat([encoder_hidden_states, hidden_states], dim=1)
        x = self.enter(x + position_ids.sum(dim=-1, keepdim=True))
        return self.leave(x + self.attn(x))


class Rows(Toy):
    """Is given no grid: tokens alone."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        x = self.enter(hidden_states)
        return self.leave(x + self.attn(x))


def channels_last() -> Tiny:
    model = randomize(Tokens3D())
    model.config = {"patch_size": (1, 1, 1)}
    inputs = dict(hidden_states=draw(2, 3, 4, 5, 4), encoder_hidden_states=draw(2, TEXT, 4))
    return Tiny(model, inputs, {"attn": (Tokens(0, 3, 4, 5, TEXT),)})


def listed() -> Tiny:
    ids = torch.cat([torch.zeros(TEXT, 3), picture_ids()])
    inputs = dict(
        hidden_states=draw(2, ROWS * COLUMNS, 4), encoder_hidden_states=draw(2, TEXT, 4), position_ids=ids
    )
    return Tiny(randomize(Listed()), inputs, {"attn": (Tokens(TEXT, 1, ROWS, COLUMNS),)})


def toy(kind: type[nn.Module] = Toy, processor: Any = None) -> Tiny:
    model = randomize(kind())
    if processor is not None:
        model.attn.set_processor(processor)
    inputs = dict(hidden_states=draw(2, ROWS * COLUMNS, 4) if kind is Rows else draw(2, 4, ROWS, COLUMNS))
    return Tiny(model, inputs, {"attn": (Tokens(0, 1, ROWS, COLUMNS),)})
