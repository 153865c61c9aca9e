"""Calls with fewer queries than keys, and with several grids in one sequence."""

from dataclasses import replace

import torch
from tiny_model import (
    _UNET,
    COLUMNS,
    ROWS,
    TEXT,
    TIME,
    Tiny,
    Tokens,
    _make,
    _two_levels,
    _unet_inputs,
    draw,
    picture_ids,
    text_mask,
)

from . import images


def prx() -> Tiny:
    """The text, padded, is looked at and does not ask."""
    model = _make(
        "PRXTransformer2DModel",
        in_channels=4,
        patch_size=2,
        context_in_dim=12,
        hidden_size=32,
        num_heads=2,
        depth=2,
        axes_dim=[8, 8],
    )
    inputs = dict(
        hidden_states=draw(2, 4, 2 * ROWS, 2 * COLUMNS),
        timestep=TIME,
        encoder_hidden_states=draw(2, TEXT, 12),
        attention_mask=text_mask(TEXT, 3),
    )
    return Tiny(model, inputs, {r"blocks\.\d+\.attention": (Tokens(TEXT, 1, ROWS, COLUMNS, silent=(TEXT, 0)),)})


def nucleus() -> Tiny:
    """The text, padded, lies behind; heads of keys are shared."""
    model = _make(
        "NucleusMoEImageTransformer2DModel",
        in_channels=16,
        out_channels=4,
        num_layers=3,
        attention_head_dim=16,
        num_attention_heads=2,
        num_key_value_heads=1,
        joint_attention_dim=12,
        axes_dims_rope=(4, 6, 6),
        moe_enabled=False,
        mlp_ratio=6.0,
    )
    inputs = dict(
        hidden_states=draw(2, ROWS * COLUMNS, 16),
        img_shapes=[(1, ROWS, COLUMNS)] * 2,
        encoder_hidden_states=draw(2, TEXT, 12),
        encoder_hidden_states_mask=text_mask(TEXT, 3),
        timestep=TIME,
    )
    places = Tokens(0, 1, ROWS, COLUMNS, TEXT, silent=(0, TEXT))
    return Tiny(model, inputs, {r"transformer_blocks\.\d+\.attn": (places,)})


def stable_cascade() -> Tiny:
    """Conditions lie behind the feature maps of two levels."""
    model = _make(
        "StableCascadeUNet",
        in_channels=4,
        out_channels=4,
        timestep_ratio_embedding_dim=8,
        conditioning_dim=16,
        block_out_channels=(16, 32),
        num_attention_heads=(2, 2),
        down_num_layers_per_block=(1, 1),
        up_num_layers_per_block=(1, 1),
        clip_text_pooled_in_channels=12,
        clip_seq=3,
        dropout=0.0,
        switch_level=(False,),
    )
    inputs = dict(sample=draw(2, 4, ROWS, COLUMNS), timestep_ratio=TIME, clip_text_pooled=draw(2, 1, 12))
    places = Tokens(0, 1, ROWS, COLUMNS, 3, silent=(0, 3))
    return Tiny(model, inputs, {r"(down|up)_blocks\.\d+\.\d+\.attention": (places,)})


def _cosmos3(sound: int) -> Tiny:
    model = _make(
        "Cosmos3OmniTransformer",
        head_dim=16,
        hidden_size=32,
        intermediate_size=32,
        latent_channel=4,
        patch_latent_dim=16,
        num_attention_heads=2,
        num_hidden_layers=2,
        num_key_value_heads=1,
        rope_axes_dim=(4, 2, 2),
        vocab_size=20,
        sound_gen=bool(sound),
        sound_dim=6 if sound else None,
    )
    frames, rows, columns = 3, 4, 5
    cells = frames * rows * columns
    total = TEXT + cells + sound
    noisy = torch.arange(frames)
    inputs = dict(
        input_ids=torch.arange(TEXT),
        text_indexes=torch.arange(TEXT),
        position_ids=torch.arange(total).expand(3, -1),
        und_len=TEXT,
        sequence_length=total,
        vision_tokens=[draw(1, 4, frames, 2 * rows, 2 * columns)],
        vision_token_shapes=[(frames, rows, columns)],
        vision_sequence_indexes=torch.arange(TEXT, TEXT + cells),
        vision_mse_loss_indexes=torch.arange(TEXT, TEXT + cells),
        vision_timesteps=torch.full((cells,), 700.0),
        vision_noisy_frame_indexes=[noisy],
    )
    if sound:
        inputs |= dict(
            sound_tokens=[draw(6, sound)],
            sound_token_shapes=[(sound, 1, 1)],
            sound_sequence_indexes=torch.arange(TEXT + cells, total),
            sound_mse_loss_indexes=torch.arange(TEXT + cells, total),
            sound_timesteps=torch.full((sound,), 700.0),
            sound_noisy_frame_indexes=[torch.arange(sound)],
        )
    places = Tokens(TEXT, frames, rows, columns, sound, silent=(TEXT, 0))
    return Tiny(model, inputs, {r"layers\.\d+\.self_attn": (places,)})


def cosmos3() -> Tiny:
    """The text asks by itself, in its order, and is looked at by the video. There is no batch."""
    return _cosmos3(0)


def cosmos3_sound() -> Tiny:
    """Sound lies behind the video, and asks with it."""
    return _cosmos3(7)


def unet_added_keys() -> Tiny:
    """Keys of the text before those of the features, as in DeepFloyd IF and Kandinsky 2."""
    blocks = _two_levels("SimpleCrossAttnDownBlock2D", "SimpleCrossAttnUpBlock2D")
    model = _make(
        "UNet2DConditionModel",
        **_UNET,
        **blocks,
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        attention_head_dim=8,
        in_channels=4,
        out_channels=4,
    )

    def places(rows: int, columns: int) -> tuple[Tokens, ...]:
        return (Tokens(TEXT, 1, rows, columns, silent=(TEXT, 0)),)

    layer = r"\.attentions\.\d+"
    layouts = {
        rf"(down_blocks\.0|up_blocks\.1){layer}": places(8, 12),
        rf"(down_blocks\.1|mid_block|up_blocks\.0){layer}": places(4, 6),
    }
    return Tiny(model, _unet_inputs(), layouts)


def glm_image_edit() -> Tiny:
    """Keys of a reference that were kept lie before the text and the image."""
    from diffusers.models.transformers.transformer_glm_image import GlmImageKVCache

    tiny = images.glm_image()
    rows, columns = 4, 5
    reference = dict(
        hidden_states=draw(1, 4, 2 * rows, 2 * columns),
        encoder_hidden_states=draw(1, 3, 12),
        prior_token_id=torch.arange(rows * columns)[None] % 32,
        prior_token_drop=torch.zeros(1, rows * columns, dtype=torch.bool),
        timestep=torch.zeros(1),
        target_size=torch.ones(1, 2),
        crop_coords=torch.zeros(1, 2),
    )
    kept = GlmImageKVCache(num_layers=len(tiny.model.transformer_blocks))
    kept.set_mode("write")
    with torch.no_grad():
        tiny.model(**reference, kv_caches=kept)
    kept.set_mode("read")
    tiny.inputs["kv_caches"] = kept
    tiny.inputs.pop("attention_mask", None)
    before = 3 + rows * columns
    places = Tokens(before + TEXT, 1, ROWS, COLUMNS, silent=(before, 0))
    tiny.spatial = {r"transformer_blocks\.\d+\.attn1": (places,)}
    return tiny


def flux2_extract() -> Tiny:
    """A first step that keeps the keys of a reference, which lies before the image and sees itself alone."""
    import models  # which has this module among its builders
    from diffusers.models.transformers import transformer_flux2

    tiny = models.flux2()
    for name, module in tiny.model.named_modules():
        if name.endswith(".attn"):
            kind = "ParallelSelf" if name.startswith("single") else ""
            module.set_processor(getattr(transformer_flux2, f"Flux2KV{kind}AttnProcessor")())
    ids = tiny.inputs["img_ids"]
    cells = ROWS * COLUMNS
    tiny.inputs["img_ids"] = torch.cat([ids[:, cells:], ids[:, :cells]], dim=1)
    tiny.inputs |= dict(kv_cache_mode="extract", num_ref_tokens=12)
    places = Tokens(TEXT + 12, 1, ROWS, COLUMNS)
    # the reference does not ask with the others, and lies behind the text: any other tokens may be silent
    tiny.spatial = {r"(single_)?transformer_blocks\.\d+\.attn": (replace(places, silent=(12, 0), aside=12),)}
    return tiny


def flux2_cached() -> Tiny:
    """A later step, which reads them."""
    tiny = flux2_extract()
    with torch.no_grad():
        kept = tiny.model(**tiny.inputs, return_dict=False)[1]
    own = slice(12, None)
    tiny.inputs |= dict(
        hidden_states=tiny.inputs["hidden_states"][:, own],
        img_ids=tiny.inputs["img_ids"][:, own],
        kv_cache=kept,
        kv_cache_mode="cached",
    )
    del tiny.inputs["num_ref_tokens"]
    places = Tokens(TEXT + 12, 1, ROWS, COLUMNS, silent=(12, 0))
    tiny.spatial = {r"(single_)?transformer_blocks\.\d+\.attn": (places,)}
    return tiny


def visual_cloze() -> Tiny:
    """Rows of examples, numbered from 1, before the row with the image that is made."""
    import models  # which has this module among its builders

    tiny = models.flux()
    rows = [picture_ids() for _ in range(3)]
    for number, row in enumerate(rows, start=1):
        row[:, 0] = number
    cells = ROWS * COLUMNS
    tiny.inputs |= dict(hidden_states=draw(2, 3 * cells, 4), img_ids=torch.cat(rows))
    further = tuple((TEXT + i * cells, 1, ROWS, COLUMNS) for i in range(2))
    places = Tokens(TEXT + 2 * cells, 1, ROWS, COLUMNS, further=further)
    tiny.spatial = dict.fromkeys(tiny.spatial, (places,))
    return tiny


def qwen_image_layered() -> Tiny:
    """Three layers, and behind them the image that they are of."""
    import models  # which has this module among its builders

    tiny = models.qwen_image(use_layer3d_rope=True, use_additional_t_cond=True)
    cells = ROWS * COLUMNS
    tiny.inputs |= dict(
        hidden_states=draw(2, 3 * cells + 12, 4),
        img_shapes=[[(1, ROWS, COLUMNS)] * 3 + [(1, 3, 4)]] * 2,
        additional_t_cond=torch.zeros(2, dtype=torch.long),
    )
    further = tuple((TEXT + i * cells, 1, ROWS, COLUMNS) for i in (1, 2))
    places = Tokens(TEXT, 1, ROWS, COLUMNS, 2 * cells + 12, further=further)
    tiny.spatial = dict.fromkeys(tiny.spatial, (places,))
    return tiny


def unet_upscaler() -> Tiny:
    """Blocks of Stable Diffusion's latent upscaler, which attend to the features, then to the text."""
    model = _make(
        "UNet2DConditionModel",
        block_out_channels=(32, 32, 64, 64),
        layers_per_block=4,
        cross_attention_dim=12,
        attention_head_dim=8,
        down_block_types=("KDownBlock2D", "KCrossAttnDownBlock2D", "KCrossAttnDownBlock2D", "KCrossAttnDownBlock2D"),
        up_block_types=("KCrossAttnUpBlock2D", "KCrossAttnUpBlock2D", "KCrossAttnUpBlock2D", "KUpBlock2D"),
        mid_block_type=None,
        act_fn="gelu",
        norm_num_groups=None,
        resnet_time_scale_shift="scale_shift",
        time_embedding_type="fourier",
        conv_in_kernel=1,
        conv_out_kernel=1,
    )
    layer = r"\.attentions\.\d+\.attn1"
    inputs = {**_unet_inputs(), "sample": draw(2, 4, 48, 64)}
    return Tiny(model, inputs, {rf"(down|up)_blocks\.\d+{layer}": (Tokens(0, 1, 6, 8),)})
