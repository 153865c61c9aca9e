"""Tiny random models of every supported family: batch of 2, non-square grid, and where their tokens lie, by hand.

Weights are drawn anew with a fixed seed, so that nothing is zero at the start and outputs are of the size of 1.
"""

from collections.abc import Callable
from typing import Any

import torch
from further import FURTHER
from tiny_model import (
    _COARSE,
    _FINE,
    _FLUX,
    _JOINT,
    _UNET,
    _WAN,
    COLUMNS,
    ROWS,
    TEXT,
    TIME,
    Tiny,
    Tokens,
    _flux_inputs,
    _make,
    _two_levels,
    _unet_inputs,
    _unet_layouts,
    _wan_inputs,
    draw,
    flat,
    picture_ids,
    randomize,
    text_mask,
)

__all__ = ["COLUMNS", "ROWS", "TEXT", "TIME", "Tiny", "Tokens", "draw", "flat", "picture_ids", "randomize", "text_mask"]


def flux(**changes: Any) -> Tiny:
    model = _make("FluxTransformer2DModel", **{**_FLUX, **changes})
    return Tiny(model, _flux_inputs(), {_JOINT: (Tokens(TEXT, 1, ROWS, COLUMNS),)})


def flux_kontext() -> Tiny:
    """Flux with a reference image of another shape behind the one that is made."""
    reference = picture_ids(3, 4)
    reference[:, 0] = 1
    inputs = {**_flux_inputs(ROWS * COLUMNS + 12), "img_ids": torch.cat([picture_ids(), reference])}
    return Tiny(_make("FluxTransformer2DModel", **_FLUX), inputs, {_JOINT: (Tokens(TEXT, 1, ROWS, COLUMNS, 12),)})


def flux_controlnet() -> Tiny:
    model = _make("FluxControlNetModel", **{**_FLUX, "axes_dims_rope": [4, 6, 6]})
    inputs = {**_flux_inputs(), "controlnet_cond": draw(2, ROWS * COLUMNS, 4)}
    return Tiny(model, inputs, {_JOINT: (Tokens(TEXT, 1, ROWS, COLUMNS),)})


def flux2() -> Tiny:
    model = _make(
        "Flux2Transformer2DModel",
        in_channels=4,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=12,
        timestep_guidance_channels=16,
        axes_dims_rope=(4, 4, 4, 4),
    )
    reference = picture_ids(3, 4, axes=4)
    reference[:, 0] = 10
    ids = torch.cat([picture_ids(axes=4), reference])
    inputs = dict(
        hidden_states=draw(2, len(ids), 4),
        encoder_hidden_states=draw(2, TEXT, 12),
        timestep=TIME,
        img_ids=ids.expand(2, -1, -1),
        txt_ids=torch.zeros(2, TEXT, 4),
        guidance=torch.ones(2),
    )
    return Tiny(model, inputs, {_JOINT: (Tokens(TEXT, 1, ROWS, COLUMNS, 12),)})


_SD3 = dict(
    sample_size=32,
    patch_size=2,
    in_channels=4,
    num_layers=3,
    attention_head_dim=8,
    num_attention_heads=2,
    joint_attention_dim=12,
    caption_projection_dim=16,
    pooled_projection_dim=8,
    out_channels=4,
    pos_embed_max_size=24,
)


def _sd3_inputs() -> dict[str, Any]:
    return dict(
        hidden_states=draw(2, 4, 2 * ROWS, 2 * COLUMNS),
        encoder_hidden_states=draw(2, TEXT, 12),
        pooled_projections=draw(2, 8),
        timestep=TIME,
    )


def sd3() -> Tiny:
    return Tiny(
        _make("SD3Transformer2DModel", **_SD3),
        _sd3_inputs(),
        {r"transformer_blocks\.\d+\.attn": (Tokens(0, 1, ROWS, COLUMNS, TEXT),)},
    )


def sd35() -> Tiny:
    """With layers that see the image a second time, alone."""
    model = _make("SD3Transformer2DModel", **_SD3, dual_attention_layers=(0, 1), qk_norm="rms_norm")
    layouts = {
        r"transformer_blocks\.\d+\.attn": (Tokens(0, 1, ROWS, COLUMNS, TEXT),),
        r"transformer_blocks\.[01]\.attn2": (Tokens(0, 1, ROWS, COLUMNS),),
    }
    return Tiny(model, _sd3_inputs(), layouts)


def sd3_controlnet() -> Tiny:
    return Tiny(
        _make("SD3ControlNetModel", **_SD3),
        {**_sd3_inputs(), "controlnet_cond": draw(2, 4, 2 * ROWS, 2 * COLUMNS)},
        {r"transformer_blocks\.\d+\.attn": (Tokens(0, 1, ROWS, COLUMNS, TEXT),)},
    )


def sd35_controlnet() -> Tiny:
    """The form of SD3.5 8b: no text, and the image comes as tokens."""
    config = {**_SD3, "joint_attention_dim": None, "caption_projection_dim": 16}
    model = _make("SD3ControlNetModel", **config, use_pos_embed=False, pos_embed_type=None)
    inputs = {
        "hidden_states": draw(2, ROWS * COLUMNS, 16),
        "pooled_projections": draw(2, 8),
        "timestep": TIME,
        "controlnet_cond": draw(2, 4, 2 * ROWS, 2 * COLUMNS),
    }
    return Tiny(model, inputs, {r"transformer_blocks\.\d+\.attn": (Tokens(0, 1, ROWS, COLUMNS),)})


def wan() -> Tiny:
    return Tiny(_make("WanTransformer3DModel", **_WAN), _wan_inputs(), {r"blocks\.\d+\.attn1": (Tokens(0, 3, 4, 5),)})


def hunyuan_video() -> Tiny:
    model = _make(
        "HunyuanVideoTransformer3DModel",
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        num_single_layers=2,
        num_refiner_layers=1,
        patch_size=2,
        patch_size_t=1,
        text_embed_dim=12,
        pooled_projection_dim=8,
        rope_axes_dim=(4, 6, 6),
    )
    inputs = dict(
        hidden_states=draw(2, 4, 3, 8, 10),
        timestep=TIME,
        encoder_hidden_states=draw(2, TEXT, 12),
        encoder_attention_mask=text_mask(TEXT, 3),
        pooled_projections=draw(2, 8),
        guidance=torch.ones(2),
    )
    return Tiny(model, inputs, {_JOINT: (Tokens(0, 3, 4, 5, TEXT),)})


def ltx() -> Tiny:
    model = _make(
        "LTXVideoTransformer3DModel",
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        cross_attention_dim=32,
        num_layers=2,
        caption_channels=12,
    )
    inputs = dict(
        hidden_states=draw(2, 60, 4),
        encoder_hidden_states=draw(2, TEXT, 12),
        timestep=TIME,
        encoder_attention_mask=text_mask(TEXT, 3).long(),
        num_frames=3,
        height=4,
        width=5,
    )
    return Tiny(model, inputs, {r"transformer_blocks\.\d+\.attn1": (Tokens(0, 3, 4, 5),)})


def _cogvideox(frames: int, **config: Any) -> Tiny:
    model = _make(
        "CogVideoXTransformer3DModel",
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
        **config,
    )
    inputs = dict(
        hidden_states=draw(2, frames, 4, 8, 10), encoder_hidden_states=draw(2, TEXT, 12), timestep=torch.tensor([7, 3])
    )
    return Tiny(model, inputs, {r"transformer_blocks\.\d+\.attn1": (Tokens(TEXT, 3, 4, 5),)})


def cogvideox() -> Tiny:
    return _cogvideox(3)


def cogvideox15() -> Tiny:
    """With rotary embeddings and patches of two frames."""
    tiny = _cogvideox(6, patch_size_t=2, use_rotary_positional_embeddings=True, patch_bias=False)
    angles = draw(60, 8).repeat_interleave(2, dim=1)
    tiny.inputs["image_rotary_emb"] = (angles.cos(), angles.sin())
    return tiny


_QWEN_IMAGE = dict(
    patch_size=2,
    in_channels=4,
    out_channels=4,
    num_layers=2,
    attention_head_dim=16,
    num_attention_heads=2,
    joint_attention_dim=12,
    axes_dims_rope=(4, 6, 6),
)


def qwen_image(**changes: Any) -> Tiny:
    model = _make("QwenImageTransformer2DModel", **{**_QWEN_IMAGE, **changes})
    inputs = dict(
        hidden_states=draw(2, ROWS * COLUMNS, 4),
        encoder_hidden_states=draw(2, TEXT, 12),
        encoder_hidden_states_mask=text_mask(TEXT, 3),
        timestep=TIME,
        img_shapes=[[(1, ROWS, COLUMNS)]] * 2,
    )
    return Tiny(model, inputs, {r"transformer_blocks\.\d+\.attn": (Tokens(TEXT, 1, ROWS, COLUMNS),)})


def qwen_image_edit() -> Tiny:
    """With a reference image behind the one that is made."""
    tiny = qwen_image()
    tiny.inputs["img_shapes"] = [[(1, ROWS, COLUMNS), (1, 3, 4)]] * 2
    tiny.inputs["hidden_states"] = draw(2, ROWS * COLUMNS + 12, 4)
    tiny.spatial = {r"transformer_blocks\.\d+\.attn": (Tokens(TEXT, 1, ROWS, COLUMNS, 12),)}
    return tiny


def qwen_image_controlnet() -> Tiny:
    tiny = qwen_image()
    tiny.model = _make("QwenImageControlNetModel", **_QWEN_IMAGE)
    tiny.inputs["controlnet_cond"] = draw(2, ROWS * COLUMNS, 4)
    return tiny


def z_image() -> Tiny:
    """Images are padded to 64 tokens and captions to 32; the second caption is longer, the first sample padded."""
    model = _make(
        "ZImageTransformer2DModel",
        in_channels=4,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=12,
        axes_dims=[4, 6, 6],
        axes_lens=[160, 32, 32],
    )
    inputs = dict(x=[draw(4, 1, 12, 18), -draw(4, 1, 12, 18)], t=TIME, cap_feats=[draw(TEXT, 12), draw(37, 12)])
    layouts = {
        r"noise_refiner\.\d+\.attention": (Tokens(0, 1, ROWS, COLUMNS, 10),),
        r"layers\.\d+\.attention": (Tokens(0, 1, ROWS, COLUMNS, 10 + 64),),
    }
    return Tiny(model, inputs, layouts)


def z_image_mixed() -> Tiny:
    """Two images of different size in one batch: 54 and 20 tokens, padded to 64 and 32."""
    tiny = z_image()
    tiny.inputs["x"] = [draw(4, 1, 12, 18), draw(4, 1, 8, 10)]
    tiny.spatial = {
        r"noise_refiner\.\d+\.attention": (Tokens(0, 1, 6, 9, 10), Tokens(0, 1, 4, 5, 44)),
        r"layers\.\d+\.attention": (Tokens(0, 1, 6, 9, 10 + 32), Tokens(0, 1, 4, 5, 12 + 64)),
    }
    return tiny


def z_image_controlnet() -> Tiny:
    """It shares the first layers of a transformer."""
    tiny = z_image()
    control = _make(
        "ZImageControlNetModel",
        control_layers_places=[0, 1],
        control_refiner_layers_places=[0],
        control_in_dim=4,
        add_control_noise_refiner="control_noise_refiner",
        dim=32,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
    )
    control.gradient_checkpointing = False  # diffusers reads it with gradients, and sets it nowhere
    tiny.model = type(control).from_transformer(control, tiny.model)
    tiny.inputs["control_context"] = [draw(4, 1, 12, 18), -draw(4, 1, 12, 18)]
    tiny.spatial = {f"(control_)?{pattern}": layout for pattern, layout in tiny.spatial.items()}
    return tiny


def pixart() -> Tiny:
    model = _make(
        "PixArtTransformer2DModel",
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        cross_attention_dim=16,
        sample_size=16,
        patch_size=2,
        caption_channels=12,
        use_additional_conditions=False,
        norm_num_groups=1,
    )
    inputs = dict(
        hidden_states=draw(2, 4, 2 * ROWS, 2 * COLUMNS),
        encoder_hidden_states=draw(2, TEXT, 12),
        timestep=torch.tensor([7, 3]),
        added_cond_kwargs={"resolution": None, "aspect_ratio": None},
        encoder_attention_mask=text_mask(TEXT, 3).long(),
    )
    return Tiny(model, inputs, {r"transformer_blocks\.\d+\.attn1": (Tokens(0, 1, ROWS, COLUMNS),)})


def sana() -> Tiny:
    """Its self-attention is linear already: nothing to swap."""
    model = _make(
        "SanaTransformer2DModel",
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=12,
        sample_size=8,
    )
    inputs = dict(
        hidden_states=draw(2, 4, ROWS, COLUMNS), encoder_hidden_states=draw(2, TEXT, 12), timestep=torch.tensor([7, 3])
    )
    return Tiny(model, inputs, {})


def lumina2() -> Tiny:
    model = _make(
        "Lumina2Transformer2DModel",
        sample_size=16,
        patch_size=2,
        in_channels=4,
        hidden_size=32,
        num_layers=2,
        num_refiner_layers=1,
        num_attention_heads=4,
        num_kv_heads=2,
        multiple_of=8,
        axes_dim_rope=(4, 2, 2),
        axes_lens=(32, 16, 16),
        cap_feat_dim=12,
    )
    inputs = dict(
        hidden_states=draw(2, 4, 2 * ROWS, 2 * COLUMNS),
        timestep=TIME,
        encoder_hidden_states=draw(2, TEXT, 12),
        encoder_attention_mask=text_mask(TEXT, 3),
    )
    layouts = {
        r"noise_refiner\.\d+\.attn": (Tokens(0, 1, ROWS, COLUMNS),),
        r"layers\.\d+\.attn": (Tokens(TEXT, 1, ROWS, COLUMNS), Tokens(3, 1, ROWS, COLUMNS, TEXT - 3)),
    }
    return Tiny(model, inputs, layouts)


def mochi() -> Tiny:
    """Calls attention once per sample, without the padding of its text."""
    model = _make(
        "MochiTransformer3DModel",
        patch_size=2,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        pooled_projection_dim=16,
        in_channels=4,
        text_embed_dim=16,
        time_embed_dim=8,
        max_sequence_length=TEXT,
    )
    inputs = dict(
        hidden_states=draw(2, 4, 3, 8, 10),
        encoder_hidden_states=draw(2, TEXT, 16),
        timestep=TIME,
        encoder_attention_mask=text_mask(TEXT, 3),
    )
    layouts = {r"transformer_blocks\.\d+\.attn1": (Tokens(0, 3, 4, 5, TEXT), Tokens(0, 3, 4, 5, 3))}
    return Tiny(model, inputs, layouts)


_HUNYUAN_DIT = dict(
    num_attention_heads=2,
    attention_head_dim=8,
    in_channels=4,
    patch_size=2,
    sample_size=16,
    hidden_size=16,
    cross_attention_dim=12,
    cross_attention_dim_t5=16,
    pooled_projection_dim=8,
    text_len=4,
    text_len_t5=TEXT,
)


def hunyuan_dit() -> Tiny:
    model = _make("HunyuanDiT2DModel", **_HUNYUAN_DIT, num_layers=4)
    angles = draw(ROWS * COLUMNS, 4).repeat_interleave(2, dim=1)
    inputs = dict(
        hidden_states=draw(2, 4, 2 * ROWS, 2 * COLUMNS),
        timestep=TIME,
        encoder_hidden_states=draw(2, 4, 12),
        text_embedding_mask=text_mask(4, 2),
        encoder_hidden_states_t5=draw(2, TEXT, 16),
        text_embedding_mask_t5=text_mask(TEXT, 3),
        image_meta_size=torch.ones(2, 6),
        style=torch.zeros(2, dtype=torch.long),
        image_rotary_emb=(angles.cos(), angles.sin()),
    )
    return Tiny(model, inputs, {r"blocks\.\d+\.attn1": (Tokens(0, 1, ROWS, COLUMNS),)})


def hunyuan_dit_controlnet() -> Tiny:
    tiny = hunyuan_dit()
    tiny.model = _make("HunyuanDiT2DControlNetModel", **_HUNYUAN_DIT, transformer_num_layers=6)
    tiny.inputs["controlnet_cond"] = draw(2, 4, 2 * ROWS, 2 * COLUMNS)
    return tiny


def sd15() -> Tiny:
    config = {**_UNET, **_two_levels("CrossAttnDownBlock2D", "CrossAttnUpBlock2D"), "attention_head_dim": 2}
    return Tiny(_make("UNet2DConditionModel", **config), _unet_inputs(), _unet_layouts())


_SDXL = dict(
    transformer_layers_per_block=(1, 2),
    attention_head_dim=(1, 2),
    use_linear_projection=True,
    addition_embed_type="text_time",
    addition_time_embed_dim=4,
    projection_class_embeddings_input_dim=6 * 4 + 8,
)


def sdxl() -> Tiny:
    """No attention on the first level, two layers a block on the second."""
    model = _make(
        "UNet2DConditionModel",
        **_UNET,
        **_SDXL,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )
    added = {"text_embeds": draw(2, 8), "time_ids": torch.ones(2, 6)}
    layer = r"\.attentions\.\d+\.transformer_blocks\.[01]\.attn1"
    layouts = {rf"(down_blocks\.1|mid_block|up_blocks\.0){layer}": (_COARSE,)}
    return Tiny(model, {**_unet_inputs(), "added_cond_kwargs": added}, layouts)


def controlnet() -> Tiny:
    model = _make(
        "ControlNetModel",
        **_UNET,
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        attention_head_dim=2,
        conditioning_embedding_out_channels=(4, 8),
    )
    # the conditioning image is as large as the embedding's strides ask: a factor of 2 here, 8 in real ones
    return Tiny(model, {**_unet_inputs(), "controlnet_cond": draw(2, 3, 16, 24)}, _unet_layouts())


def controlnet_union() -> Tiny:
    """Two kinds of control, the first of them given."""
    model = _make(
        "ControlNetUnionModel",
        **_UNET,
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        attention_head_dim=2,
        conditioning_embedding_out_channels=(4, 8),
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=2 * 4 + 8,
        num_control_type=2,
        num_trans_channel=8,
        num_trans_head=2,
        num_proj_channel=8,
    )
    inputs = dict(
        controlnet_cond=[draw(2, 3, 16, 24)],
        control_type=torch.tensor([[1.0, 0.0]] * 2),
        control_type_idx=[0],
        added_cond_kwargs={"text_embeds": draw(2, 8), "time_ids": torch.ones(2, 2)},
    )
    return Tiny(model, {**_unet_inputs(), **inputs}, _unet_layouts())


def animatediff() -> Tiny:
    model = _make(
        "UNetMotionModel",
        **_UNET,
        **_two_levels("CrossAttnDownBlockMotion", "CrossAttnUpBlockMotion"),
        num_attention_heads=2,
        motion_num_attention_heads=2,
        motion_max_seq_length=8,
    )
    # its pipeline repeats the text for every frame
    inputs = {**_unet_inputs(), "sample": draw(2, 4, 5, 8, 12), "encoder_hidden_states": draw(10, TEXT, 12)}
    along = {r".*motion_modules\.\d+\.transformer_blocks\.\d+\.attn[12]": (Tokens(0, 5, 1, 1),)}
    return Tiny(model, inputs, _unet_layouts(), along)


def svd() -> Tiny:
    model = _make(
        "UNetSpatioTemporalConditionModel",
        in_channels=8,
        **{key: value for key, value in _UNET.items() if key != "norm_num_groups"} | {"block_out_channels": (32, 64)},
        **_two_levels("CrossAttnDownBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=12,
        num_attention_heads=(2, 4),
        num_frames=5,
    )
    inputs = dict(
        sample=draw(2, 5, 8, 8, 12),
        timestep=torch.tensor([7, 3]),
        encoder_hidden_states=draw(2, 1, 12),
        added_time_ids=torch.ones(2, 3),
    )
    along = {r".*\.temporal_transformer_blocks\.\d+\.attn1": (Tokens(0, 5, 1, 1),)}
    return Tiny(model, inputs, _unet_layouts(), along)


def unet3d() -> Tiny:
    config = {**_UNET, **_two_levels("CrossAttnDownBlock3D", "CrossAttnUpBlock3D"), "attention_head_dim": 8}
    inputs = {**_unet_inputs(), "sample": draw(2, 4, 5, 8, 12)}
    along = {r"(.*temp_attentions\.\d+|transformer_in)\.transformer_blocks\.\d+\.attn[12]": (Tokens(0, 5, 1, 1),)}
    return Tiny(_make("UNet3DConditionModel", **config), inputs, _unet_layouts(), along)


def star_controlnet() -> Tiny:
    """The control branch of STAR, which pads its coarse level by a row more."""
    from diffattn.pipelines.video_sr import STARControlNetModel

    config = {**_UNET, "down_block_types": ("CrossAttnDownBlock3D",) * 2, "attention_head_dim": 8}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = randomize(STARControlNetModel(**config))
    inputs = {**_unet_inputs(), "sample": draw(2, 4, 5, 8, 12), "controlnet_cond": draw(2, 4, 5, 8, 12)}
    layer = r"\.attentions\.\d+\.transformer_blocks\.\d+\.attn1"
    layouts = {rf"down_blocks\.0{layer}": (_FINE,), rf"(down_blocks\.1|mid_block){layer}": (Tokens(0, 1, 5, 6),)}
    along = {r"(.*temp_attentions\.\d+|transformer_in)\.transformer_blocks\.\d+\.attn[12]": (Tokens(0, 5, 1, 1),)}
    return Tiny(model, inputs, layouts, along)


def i2vgen() -> Tiny:
    config = {**_UNET, **_two_levels("CrossAttnDownBlock3D", "CrossAttnUpBlock3D"), "attention_head_dim": 8}
    inputs = dict(
        sample=draw(2, 4, 5, 8, 12),
        timestep=torch.tensor([7, 3]),
        fps=torch.tensor([8, 8]),
        image_latents=draw(2, 4, 5, 8, 12),
        image_embeddings=draw(2, 12),
        encoder_hidden_states=draw(2, TEXT, 12),
    )
    along = {r"(.*temp_attentions\.\d+|transformer_in)\.transformer_blocks\.\d+\.attn[12]": (Tokens(0, 5, 1, 1),)}
    return Tiny(_make("I2VGenXLUNet", **config), inputs, _unet_layouts(), along)


BUILDERS: dict[str, Callable[[], Tiny]] = {
    "Flux": flux,
    "Flux-Kontext": flux_kontext,
    "Flux-ControlNet": flux_controlnet,
    "Flux2": flux2,
    "SD3": sd3,
    "SD3.5": sd35,
    "SD3-ControlNet": sd3_controlnet,
    "SD3.5-ControlNet": sd35_controlnet,
    "Wan": wan,
    "HunyuanVideo": hunyuan_video,
    "LTX": ltx,
    "CogVideoX": cogvideox,
    "CogVideoX-1.5": cogvideox15,
    "Qwen-Image": qwen_image,
    "Qwen-Image-Edit": qwen_image_edit,
    "Qwen-Image-ControlNet": qwen_image_controlnet,
    "Z-Image": z_image,
    "Z-Image-mixed": z_image_mixed,
    "Z-Image-ControlNet": z_image_controlnet,
    "PixArt": pixart,
    "Lumina2": lumina2,
    "Mochi": mochi,
    "HunyuanDiT": hunyuan_dit,
    "HunyuanDiT-ControlNet": hunyuan_dit_controlnet,
    "SD1.5": sd15,
    "SDXL": sdxl,
    "SD-ControlNet": controlnet,
    "SD-ControlNet-Union": controlnet_union,
    "AnimateDiff": animatediff,
    "SVD": svd,
    "I2VGen-XL": i2vgen,
    "UNet3D": unet3d,
    "STAR-ControlNet": star_controlnet,
    **FURTHER,
}
"""Every family that can be swapped."""
