"""Video transformers."""

import sys
from types import SimpleNamespace
from typing import Any

import torch
from tiny_model import (
    _JOINT,
    COLUMNS,
    ROWS,
    TEXT,
    TIME,
    Tiny,
    Tokens,
    _make,
    draw,
    text_mask,
)
from torch.nn import functional as F

ATTN1 = r"transformer_blocks\.\d+\.attn1"
VIDEO = Tokens(0, 3, 4, 5)
"""3 frames of 4 x 5 tokens, alone."""


def hunyuan_video15() -> Tiny:
    """Two texts and an image's tokens behind the cells, padding among them."""
    model = _make(
        "HunyuanVideo15Transformer3DModel",
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        num_refiner_layers=1,
        patch_size=2,
        patch_size_t=1,
        text_embed_dim=12,
        text_embed_2_dim=10,
        image_embed_dim=8,
        rope_axes_dim=(4, 6, 6),
    )
    inputs = dict(
        hidden_states=draw(2, 4, 3, 8, 10),
        timestep=TIME,
        encoder_hidden_states=draw(2, TEXT, 12),
        encoder_attention_mask=text_mask(TEXT, 3),
        encoder_hidden_states_2=draw(2, 4, 10),
        encoder_attention_mask_2=text_mask(4, 2),
        image_embeds=draw(2, 3, 8),
    )
    return Tiny(model, inputs, {r"transformer_blocks\.\d+\.attn": (Tokens(0, 3, 4, 5, TEXT + 4 + 3),)})


def allegro() -> Tiny:
    model = _make(
        "AllegroTransformer3DModel",
        patch_size=2,
        patch_size_t=1,
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        cross_attention_dim=24,
        sample_height=8,
        sample_width=10,
        sample_frames=3,
        caption_channels=12,
    )
    inputs = dict(
        hidden_states=draw(2, 4, 3, 8, 10), encoder_hidden_states=draw(2, TEXT, 12), timestep=torch.tensor([7, 3])
    )
    return Tiny(model, inputs, {ATTN1: (VIDEO,)})


def cosmos() -> Tiny:
    model = _make(
        "CosmosTransformer3DModel",
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        mlp_ratio=2.0,
        text_embed_dim=12,
        adaln_lora_dim=4,
        max_size=(4, 12, 12),
        patch_size=(1, 2, 2),
        concat_padding_mask=False,
    )
    inputs = dict(hidden_states=draw(2, 4, 3, 8, 10), timestep=TIME, encoder_hidden_states=draw(2, TEXT, 12))
    return Tiny(model, inputs, {ATTN1: (VIDEO,)})


def cosmos_controlnet() -> Tiny:
    """It resizes masks by torchvision; where that is not installed, something like it does."""
    model = _make(
        "CosmosControlNetModel",
        n_controlnet_blocks=2,
        in_channels=6,
        latent_channels=6,
        model_channels=32,
        num_attention_heads=2,
        attention_head_dim=16,
        mlp_ratio=2.0,
        text_embed_dim=12,
        adaln_lora_dim=4,
        max_size=(4, 12, 12),
    )
    module = sys.modules[type(model).__module__]
    if not hasattr(module, "transforms"):
        functional = SimpleNamespace(resize=lambda mask, size, interpolation: F.interpolate(mask, size))
        module.transforms = SimpleNamespace(functional=functional, InterpolationMode=SimpleNamespace(NEAREST=0))
    inputs = dict(
        controls_latents=draw(2, 4, 3, 8, 10),
        latents=-draw(2, 4, 3, 8, 10),
        timestep=TIME,
        encoder_hidden_states=draw(2, TEXT, 12),
        condition_mask=torch.ones(2, 1, 3, 8, 10),
        padding_mask=torch.zeros(1, 1, 16, 20),
    )
    return Tiny(model, inputs, {r"control_blocks\.\d+\.attn1": (VIDEO,)})


def easy_animate() -> Tiny:
    model = _make(
        "EasyAnimateTransformer3DModel",
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        patch_size=2,
        sample_width=10,
        sample_height=8,
        num_layers=2,
        mmdit_layers=2,
        time_embed_dim=8,
        text_embed_dim=12,
        time_position_encoding_type="3d_rope",
        resize_inpaint_mask_directly=True,
    )
    inputs = dict(hidden_states=draw(2, 4, 3, 8, 10), timestep=TIME, encoder_hidden_states=draw(2, TEXT, 12))
    return Tiny(model, inputs, {ATTN1: (Tokens(TEXT, 3, 4, 5),)})


def latte() -> Tiny:
    """Layers in space, frames in the batch, in turn with layers in time."""
    model = _make(
        "LatteTransformer3DModel",
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        cross_attention_dim=24,
        sample_size=12,
        patch_size=2,
        norm_type="ada_norm_single",
        num_embeds_ada_norm=1000,
        caption_channels=12,
        video_length=3,
    )
    inputs = dict(
        hidden_states=draw(2, 4, 3, 12, 18), timestep=torch.tensor([7, 3]), encoder_hidden_states=draw(2, TEXT, 12)
    )
    return Tiny(
        model,
        inputs,
        {ATTN1: (Tokens(0, 1, 6, 9),)},
        {r"temporal_transformer_blocks\.\d+\.attn1": (Tokens(0, 3, 1, 1),)},
    )


def joy_image() -> Tiny:
    """One frame, and the text behind."""
    model = _make(
        "JoyImageEditTransformer3DModel",
        in_channels=4,
        hidden_size=32,
        num_attention_heads=2,
        text_dim=12,
        num_layers=2,
        rope_dim_list=[4, 6, 6],
    )
    inputs = dict(
        hidden_states=draw(2, 4, 1, 2 * ROWS, 2 * COLUMNS),
        timestep=torch.tensor([7, 3]),
        encoder_hidden_states=draw(2, TEXT, 12),
    )
    return Tiny(model, inputs, {r"double_blocks\.\d+\.attn": (Tokens(0, 1, ROWS, COLUMNS, TEXT),)})


def joy_image_plus() -> Tiny:
    """The image, then references and padding up to the longest sample, then the text."""
    model = _make(
        "JoyImageEditPlusTransformer3DModel",
        in_channels=4,
        hidden_size=32,
        num_attention_heads=2,
        text_dim=12,
        num_layers=2,
        rope_dim_list=[4, 6, 6],
    )
    patches = ROWS * COLUMNS + 12
    inputs = dict(
        hidden_states=draw(2, patches, 4, 1, 2, 2),
        timestep=torch.tensor([7, 3]),
        encoder_hidden_states=draw(2, TEXT, 12),
        encoder_hidden_states_mask=text_mask(TEXT, 3).float(),
        shape_list=[[(1, ROWS, COLUMNS), (1, 3, 4)], [(1, 5, 4), (1, 4, 3)]],
    )
    layouts = (Tokens(0, 1, ROWS, COLUMNS, 12 + TEXT), Tokens(0, 1, 5, 4, patches - 20 + TEXT))
    return Tiny(model, inputs, {r"double_blocks\.\d+\.attn": layouts})


def kandinsky5(**options: Any) -> Tiny:
    """Channels last, cells alone."""
    model = _make(
        "Kandinsky5Transformer3DModel",
        in_visual_dim=4,
        in_text_dim=12,
        in_text_dim2=8,
        time_dim=16,
        out_visual_dim=4,
        model_dim=32,
        ff_dim=32,
        num_text_blocks=1,
        num_visual_blocks=2,
        axes_dims=(4, 6, 6),
        **options,
    )
    inputs = dict(
        hidden_states=draw(2, 3, 8, 10, 4),
        encoder_hidden_states=draw(2, TEXT, 12),
        timestep=TIME,
        pooled_projections=draw(2, 8),
        visual_rope_pos=[torch.arange(3), torch.arange(4), torch.arange(5)],
        text_rope_pos=torch.arange(TEXT),
    )
    return Tiny(model, inputs, {r"visual_transformer_blocks\.\d+\.self_attention": (VIDEO,)})


def motif_video() -> Tiny:
    """An image's tokens and padded text behind; behind the cells of the last layer those of the layer before."""
    model = _make(
        "MotifVideoTransformer3DModel",
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=1,
        num_single_layers=2,
        num_decoder_layers=1,
        mlp_ratio=1.0,
        text_embed_dim=12,
        image_embed_dim=8,
        rope_axes_dim=(4, 6, 6),
    )
    inputs = dict(
        hidden_states=draw(2, 4, 3, 8, 10),
        timestep=TIME,
        encoder_hidden_states=draw(2, TEXT, 12),
        encoder_attention_mask=text_mask(TEXT, 3),
        image_embeds=draw(2, 2, 8),
    )
    layouts = {
        r"(single_)?transformer_blocks\.0\.attn": (Tokens(0, 3, 4, 5, 2 + TEXT),),
        r"single_transformer_blocks\.1\.attn": (Tokens(0, 3, 4, 5, 60),),
    }
    return Tiny(model, inputs, layouts)


def ltx2() -> Tiny:
    """Keyframes behind the cells, placed by coordinates; the audio has layers of its own."""
    model = _make(
        "LTX2VideoTransformer3DModel",
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        cross_attention_dim=32,
        audio_in_channels=4,
        audio_out_channels=4,
        audio_num_attention_heads=2,
        audio_attention_head_dim=8,
        audio_cross_attention_dim=16,
        num_layers=2,
        caption_channels=12,
    )
    coordinates = model.rope.prepare_video_coords(2, 3, 4, 5, torch.device("cpu"))
    inputs = dict(
        hidden_states=draw(2, 80, 4),
        audio_hidden_states=draw(2, 7, 4),
        encoder_hidden_states=draw(2, TEXT, 12),
        audio_encoder_hidden_states=draw(2, 4, 12),
        timestep=torch.tensor([700.0, 300.0]),
        num_frames=3,
        height=4,
        width=5,
        audio_num_frames=7,
        video_coords=torch.cat([coordinates, coordinates[:, :, :20] + 1], dim=2),
    )
    return Tiny(model, inputs, {ATTN1: (Tokens(0, 3, 4, 5, 20),)})


def consisid() -> Tiny:
    model = _make(
        "ConsisIDTransformer3DModel",
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        time_embed_dim=4,
        text_embed_dim=12,
        num_layers=2,
        sample_width=10,
        sample_height=8,
        sample_frames=9,
        max_text_seq_length=TEXT,
    )
    inputs = dict(
        hidden_states=draw(2, 3, 4, 8, 10), encoder_hidden_states=draw(2, TEXT, 12), timestep=torch.tensor([7, 3])
    )
    return Tiny(model, inputs, {ATTN1: (Tokens(TEXT, 3, 4, 5),)})


def kandinsky6() -> Tiny:
    """With audio, whose layers are its own."""
    model = _make(
        "Kandinsky6Transformer3DModel",
        in_visual_dim=4,
        out_visual_dim=4,
        in_text_dim=12,
        in_text_dim2=8,
        time_dim=16,
        model_dim=32,
        ff_dim=32,
        num_text_blocks=1,
        num_visual_blocks=2,
        axes_dims=(4, 6, 6),
        visual_cond=False,
        in_audio_dim=4,
        out_audio_dim=4,
    )
    inputs = dict(
        hidden_states=draw(2, 3, 8, 10, 4),
        encoder_hidden_states=draw(2, TEXT, 12),
        pooled_projections=draw(2, 8),
        timestep=TIME,
        audio_hidden_states=draw(2, 7, 4),
    )
    return Tiny(model, inputs, {r"visual_transformer_blocks\.\d+\.video_dec_block\.self_attention": (VIDEO,)})


def framepack() -> Tiny:
    """Frames made before lie before the cells, an image's tokens and padded text behind."""
    model = _make(
        "HunyuanVideoFramepackTransformer3DModel",
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        text_embed_dim=12,
        pooled_projection_dim=8,
        rope_axes_dim=(4, 6, 6),
        has_image_proj=True,
        image_proj_dim=8,
        has_clean_x_embedder=True,
    )
    inputs = dict(
        hidden_states=draw(2, 4, 3, 8, 10),
        timestep=TIME,
        encoder_hidden_states=draw(2, TEXT, 12),
        encoder_attention_mask=text_mask(TEXT, 3),
        pooled_projections=draw(2, 8),
        image_embeds=draw(2, 2, 8),
        guidance=torch.ones(2),
        indices_latents=torch.arange(8, 11),
        latents_clean=draw(2, 4, 2, 8, 10),
        indices_latents_clean=torch.tensor([0, 7]),
        latents_history_2x=draw(2, 4, 2, 8, 10),
        indices_latents_history_2x=torch.tensor([5, 6]),
        latents_history_4x=draw(2, 4, 4, 8, 10),
        indices_latents_history_4x=torch.tensor([1, 2, 3, 4]),
    )
    history = 2 * 4 * 5 + 2 * 3 + 1 * 2
    return Tiny(model, inputs, {_JOINT: (Tokens(history, 3, 4, 5, 2 + TEXT),)})
