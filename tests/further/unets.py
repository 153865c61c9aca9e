"""UNets and their ControlNets."""

from tiny_model import (
    _COARSE,
    _FINE,
    _UNET,
    TEXT,
    Tiny,
    Tokens,
    _make,
    _two_levels,
    _unet_inputs,
    _unet_layouts,
    _without,
    draw,
)

ALONG_FRAMES = {r".*motion_modules\.\d+\.transformer_blocks\.\d+\.attn[12]": (Tokens(0, 5, 1, 1),)}


def sparse_controlnet() -> Tiny:
    """Conditions at some of the frames."""
    model = _make(
        "SparseControlNetModel",
        **_UNET,
        down_block_types=("CrossAttnDownBlockMotion",) * 2,
        num_attention_heads=2,
        motion_num_attention_heads=2,
        motion_max_seq_length=8,
    )
    inputs = {
        **_unet_inputs(),
        "sample": draw(2, 4, 5, 8, 12),
        "encoder_hidden_states": draw(10, TEXT, 12),
        "controlnet_cond": draw(2, 4, 5, 8, 12),
        "conditioning_mask": (draw(2, 1, 5, 8, 12) > 0).float(),
    }
    return Tiny(model, inputs, _unet_layouts(), ALONG_FRAMES)


def controlnet_xs() -> Tiny:
    """A UNet together with its small ControlNet: each level has the layers of both."""
    model = _make(
        "UNetControlNetXSModel",
        **_without(_UNET, "layers_per_block"),
        **_two_levels("CrossAttnDownBlock2D", "CrossAttnUpBlock2D"),
        num_attention_heads=2,
        ctrl_block_out_channels=(4, 8),
        ctrl_num_attention_heads=2,
        ctrl_max_norm_num_groups=4,
        ctrl_conditioning_embedding_out_channels=(4, 8),
    )
    layer = r"\.((base|ctrl)_)?attentions\.\d+\.transformer_blocks\.\d+\.attn1"
    layouts = {
        rf"(down_blocks\.0|up_blocks\.1){layer}": (_FINE,),
        rf"(down_blocks\.1|mid_block\.(base|ctrl)_midblock|up_blocks\.0){layer}": (_COARSE,),
    }
    return Tiny(model, {**_unet_inputs(), "controlnet_cond": draw(2, 3, 16, 24)}, layouts)


def audio_ldm2() -> Tiny:
    """Spectrograms; in each place one layer sees the features alone, and one the text too."""
    config = {**_UNET, "cross_attention_dim": ((None, 12), (None, 12)), "attention_head_dim": 2}
    model = _make(
        "AudioLDM2UNet2DConditionModel", **config, **_two_levels("CrossAttnDownBlock2D", "CrossAttnUpBlock2D")
    )
    return Tiny(model, _unet_inputs(), _unet_layouts())


def dream_lite() -> Tiny:
    """Grouped heads."""
    model = _make(
        "DreamLiteUNetModel",
        **_UNET,
        **_two_levels("DreamLiteCrossAttnDownBlock2D", "DreamLiteCrossAttnUpBlock2D"),
        attention_head_dim=2,
        ff_mult=1,
    )
    return Tiny(model, _unet_inputs(), _unet_layouts())


def unet2d() -> Tiny:
    """Attention without blocks around it."""
    model = _make(
        "UNet2DModel",
        **_without(_UNET, "cross_attention_dim"),
        **_two_levels("AttnDownBlock2D", "AttnUpBlock2D"),
        in_channels=4,
        out_channels=4,
        attention_head_dim=4,
    )
    layouts = {
        r"(down_blocks\.0|up_blocks\.1)\.attentions\.\d+": (_FINE,),
        r"(down_blocks\.1|mid_block|up_blocks\.0)\.attentions\.\d+": (_COARSE,),
    }
    return Tiny(model, _without(_unet_inputs(), "encoder_hidden_states"), layouts)
