"""Tiny random models of further classes, in the form of `models`: variants of known families and their like."""

from typing import Any

import torch
from models import _FLUX, _JOINT, COLUMNS, ROWS, TEXT, TIME, Tiny, Tokens, _flux_inputs, _make, draw, picture_ids, text_mask

VIDEO = Tokens(0, 3, 4, 5)
"""3 frames of 4 x 5 tokens, alone."""
ATTN1 = r"transformer_blocks\.\d+\.attn1"
IMAGE = Tokens(TEXT, 1, ROWS, COLUMNS)


def _without(values: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name not in names}


def chroma() -> Tiny:
    """Padded text under a mask on keys."""
    own = {"approximator_num_channels": 64, "approximator_hidden_dim": 16, "approximator_layers": 1}
    model = _make("ChromaTransformer2DModel", **_without(_FLUX, "pooled_projection_dim"), **own)
    mask = torch.cat([text_mask(TEXT, 3), torch.ones(2, ROWS * COLUMNS, dtype=torch.bool)], dim=1)
    inputs = {**_without(_flux_inputs(), "pooled_projections"), "attention_mask": mask}
    return Tiny(model, inputs, {_JOINT: (IMAGE,)})


def bria() -> Tiny:
    model = _make("BriaTransformer2DModel", **{**_FLUX, "pooled_projection_dim": None, "axes_dims_rope": [4, 6, 6]})
    return Tiny(model, _without(_flux_inputs(), "pooled_projections"), {_JOINT: (IMAGE,)})


def ovis_image() -> Tiny:
    config = _without(_FLUX, "pooled_projection_dim")
    model = _make("OvisImageTransformer2DModel", **config, out_channels=4)
    return Tiny(model, _without(_flux_inputs(), "pooled_projections"), {_JOINT: (IMAGE,)})


def longcat_image() -> Tiny:
    """Ids with an offset, and a reference behind, as its edits have it."""
    model = _make("LongCatImageTransformer2DModel", **{**_FLUX, "pooled_projection_dim": 12, "axes_dims_rope": [4, 6, 6]})
    reference = picture_ids(3, 4)
    own, reference[:, 0] = picture_ids(), 2
    own[:, 0] = 1
    ids = torch.cat([own, reference])
    ids[:, 1:] += 512
    inputs = {**_without(_flux_inputs(len(ids)), "pooled_projections"), "img_ids": ids}
    return Tiny(model, inputs, {_JOINT: (Tokens(TEXT, 1, ROWS, COLUMNS, 12),)})


_WAN = dict(
    patch_size=(1, 2, 2),
    num_attention_heads=2,
    attention_head_dim=12,
    in_channels=4,
    out_channels=4,
    text_dim=8,
    freq_dim=16,
    ffn_dim=16,
    num_layers=2,
    rope_max_seq_len=32,
)


def _wan_inputs() -> dict[str, Any]:
    return dict(
        hidden_states=draw(2, 4, 3, 8, 10), timestep=torch.tensor([7, 3]), encoder_hidden_states=draw(2, TEXT, 8)
    )


def chrono_edit() -> Tiny:
    return Tiny(_make("ChronoEditTransformer3DModel", **_WAN), _wan_inputs(), {r"blocks\.\d+\.attn1": (VIDEO,)})


def wan_vace() -> Tiny:
    """The blocks of the control see the same cells."""
    model = _make("WanVACETransformer3DModel", **_WAN, vace_layers=[0, 1], vace_in_channels=6)
    inputs = {**_wan_inputs(), "control_hidden_states": draw(2, 6, 3, 8, 10)}
    return Tiny(model, inputs, {r"(vace_)?blocks\.\d+\.attn1": (VIDEO,)})


def skyreels_v2() -> Tiny:
    return Tiny(_make("SkyReelsV2Transformer3DModel", **_WAN), _wan_inputs(), {r"blocks\.\d+\.attn1": (VIDEO,)})


def any_flow() -> Tiny:
    """Frames on the first axis after the batch."""
    model = _make("AnyFlowTransformer3DModel", **_WAN)
    inputs = {
        **_wan_inputs(),
        "hidden_states": draw(2, 3, 4, 8, 10),
        "timestep": torch.tensor([[7, 7, 7], [3, 3, 3]]),
        "r_timestep": torch.tensor([[2, 2, 2], [1, 1, 1]]),
    }
    return Tiny(model, inputs, {r"blocks\.\d+\.attn1": (VIDEO,)})


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


def aura_flow() -> Tiny:
    """Registers lie before the text."""
    model = _make(
        "AuraFlowTransformer2DModel",
        sample_size=24,
        patch_size=2,
        in_channels=4,
        num_mmdit_layers=2,
        num_single_dit_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=12,
        caption_projection_dim=16,
        pos_embed_max_size=144,
    )
    inputs = dict(
        hidden_states=draw(2, 4, 2 * ROWS, 2 * COLUMNS), encoder_hidden_states=draw(2, TEXT, 12), timestep=TIME
    )
    registers = 8
    return Tiny(model, inputs, {r"(joint|single)_transformer_blocks\.\d+\.attn": (Tokens(registers + TEXT, 1, ROWS, COLUMNS),)})


def _cogview(name: str, **config: Any) -> Tiny:
    model = _make(
        name,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        text_embed_dim=12,
        time_embed_dim=8,
        condition_dim=4,
        **config,
    )
    size = torch.tensor([[96.0, 144.0], [96.0, 144.0]])
    inputs = dict(
        hidden_states=draw(2, 4, 2 * ROWS, 2 * COLUMNS),
        encoder_hidden_states=draw(2, TEXT, 12),
        timestep=torch.tensor([7, 3]),
        original_size=size,
        target_size=size,
        crop_coords=torch.zeros(2, 2),
    )
    return Tiny(model, inputs, {ATTN1: (IMAGE,)})


def cogview3_plus() -> Tiny:
    return _cogview("CogView3PlusTransformer2DModel", pos_embed_max_size=24, sample_size=24)


def cogview4() -> Tiny:
    return _cogview("CogView4Transformer2DModel", rope_axes_dim=(24, 24), sample_size=24)


def glm_image() -> Tiny:
    found = _cogview("GlmImageTransformer2DModel", prior_vq_quantizer_codebook_size=32)
    del found.inputs["original_size"]
    found.inputs["prior_token_id"] = torch.arange(2 * ROWS * COLUMNS).view(2, -1) % 32
    found.inputs["prior_token_drop"] = torch.zeros(2, ROWS * COLUMNS, dtype=torch.bool)
    return found


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


def ernie_image() -> Tiny:
    """The text lies behind, padded."""
    model = _make(
        "ErnieImageTransformer2DModel",
        hidden_size=32,
        num_attention_heads=2,
        num_layers=2,
        ffn_hidden_size=32,
        in_channels=4,
        out_channels=4,
        patch_size=1,
        text_in_dim=12,
        rope_axes_dim=(4, 6, 6),
    )
    inputs = dict(
        hidden_states=draw(2, 4, ROWS, COLUMNS),
        timestep=TIME,
        text_bth=draw(2, TEXT, 12),
        text_lens=torch.tensor([TEXT, 3]),
    )
    return Tiny(model, inputs, {r"layers\.\d+\.self_attention": (Tokens(0, 1, ROWS, COLUMNS, TEXT),)})


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
        hidden_states=draw(2, 4, 3, 12, 12), timestep=torch.tensor([7, 3]), encoder_hidden_states=draw(2, TEXT, 12)
    )
    return Tiny(
        model,
        inputs,
        {ATTN1: (Tokens(0, 1, 6, 6),)},
        {r"temporal_transformer_blocks\.\d+\.attn1": (Tokens(0, 3, 1, 1),)},
    )


def dit() -> Tiny:
    model = _make(
        "DiTTransformer2DModel",
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        sample_size=12,
        patch_size=2,
        num_embeds_ada_norm=10,
        norm_num_groups=2,
    )
    inputs = dict(hidden_states=draw(2, 4, 12, 12), timestep=torch.tensor([7, 3]), class_labels=torch.tensor([1, 4]))
    return Tiny(model, inputs, {ATTN1: (Tokens(0, 1, 6, 6),)})


def hunyuan_image() -> Tiny:
    """Text behind, under a mask on keys."""
    model = _make("HunyuanImageTransformer2DModel", **_HUNYUAN_IMAGE, patch_size=(1, 1), rope_axes_dim=(8, 8))
    inputs = dict(
        hidden_states=draw(2, 4, ROWS, COLUMNS),
        timestep=TIME,
        encoder_hidden_states=draw(2, TEXT, 12),
        encoder_attention_mask=text_mask(TEXT, 3),
    )
    return Tiny(model, inputs, {_JOINT: (Tokens(0, 1, ROWS, COLUMNS, TEXT),)})


def hunyuan_image_refiner() -> Tiny:
    """Latents with an axis of frames."""
    model = _make("HunyuanImageTransformer2DModel", **_HUNYUAN_IMAGE, patch_size=(1, 1, 1), rope_axes_dim=(4, 6, 6))
    inputs = dict(
        hidden_states=draw(2, 4, 3, 4, 5),
        timestep=TIME,
        encoder_hidden_states=draw(2, TEXT, 12),
        encoder_attention_mask=text_mask(TEXT, 3),
    )
    return Tiny(model, inputs, {_JOINT: (Tokens(0, 3, 4, 5, TEXT),)})


_HUNYUAN_IMAGE = dict(
    in_channels=4,
    out_channels=4,
    num_attention_heads=2,
    attention_head_dim=16,
    num_layers=2,
    num_single_layers=2,
    num_refiner_layers=1,
    text_embed_dim=12,
)


def krea2() -> Tiny:
    """Grouped heads; text first, with all positions 0, then the image; padded text under a mask."""
    model = _make(
        "Krea2Transformer2DModel",
        in_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=32,
        timestep_embed_dim=16,
        text_hidden_dim=16,
        num_text_layers=2,
        text_num_attention_heads=2,
        text_num_key_value_heads=2,
        text_intermediate_size=16,
        num_layerwise_text_blocks=1,
        num_refiner_text_blocks=1,
        axes_dims_rope=(4, 6, 6),
    )
    inputs = dict(
        hidden_states=draw(2, ROWS * COLUMNS, 4),
        encoder_hidden_states=draw(2, TEXT, 2, 16),
        timestep=TIME,
        position_ids=torch.cat([torch.zeros(TEXT, 3), picture_ids()]),
        encoder_attention_mask=text_mask(TEXT, 3),
    )
    return Tiny(model, inputs, {r"transformer_blocks\.\d+\.attn": (IMAGE,)})


def kandinsky5() -> Tiny:
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


FURTHER = {
    "Chroma": chroma,
    "Bria": bria,
    "Ovis-Image": ovis_image,
    "LongCat-Image": longcat_image,
    "ChronoEdit": chrono_edit,
    "Wan-VACE": wan_vace,
    "SkyReels-V2": skyreels_v2,
    "AnyFlow": any_flow,
    "HunyuanVideo-1.5": hunyuan_video15,
    "Allegro": allegro,
    "AuraFlow": aura_flow,
    "CogView3+": cogview3_plus,
    "CogView4": cogview4,
    "GLM-Image": glm_image,
    "Cosmos": cosmos,
    "EasyAnimate": easy_animate,
    "ERNIE-Image": ernie_image,
    "Latte": latte,
    "DiT": dit,
    "HunyuanImage": hunyuan_image,
    "HunyuanImage-refiner": hunyuan_image_refiner,
    "Krea2": krea2,
    "Kandinsky5": kandinsky5,
}
"""Name -> builder."""
