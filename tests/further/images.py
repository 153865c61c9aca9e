"""Image transformers."""

from typing import Any

import torch
from tiny_model import _JOINT, COLUMNS, ROWS, TEXT, TIME, Tiny, Tokens, _make, draw, picture_ids, text_mask

ATTN1 = r"transformer_blocks\.\d+\.attn1"
IMAGE = Tokens(TEXT, 1, ROWS, COLUMNS)


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
    return Tiny(
        model, inputs, {r"(joint|single)_transformer_blocks\.\d+\.attn": (Tokens(registers + TEXT, 1, ROWS, COLUMNS),)}
    )


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


def dit() -> Tiny:
    """It can make square images alone."""
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


def lumina_next() -> Tiny:
    """Grouped heads; the rotary embedding is of the largest size."""
    model = _make(
        "LuminaNextDiT2DModel",
        sample_size=24,
        patch_size=2,
        in_channels=4,
        hidden_size=32,
        num_layers=2,
        num_attention_heads=4,
        num_kv_heads=2,
        multiple_of=8,
        cross_attention_dim=12,
    )
    angles = draw(24, 24, 4)
    inputs = dict(
        hidden_states=draw(2, 4, 2 * ROWS, 2 * COLUMNS),
        timestep=TIME,
        encoder_hidden_states=draw(2, TEXT, 12),
        encoder_mask=text_mask(TEXT, 3),
        image_rotary_emb=torch.polar(torch.ones_like(angles), angles),
        cross_attention_kwargs={},
    )
    return Tiny(model, inputs, {r"layers\.\d+\.attn1": (Tokens(0, 1, ROWS, COLUMNS),)})


def omnigen() -> Tiny:
    """Text, a given image, the time, then the image, under a mask of its own for every query."""
    model = _make(
        "OmniGenTransformer2DModel",
        in_channels=4,
        patch_size=2,
        hidden_size=32,
        num_attention_heads=2,
        num_key_value_heads=2,
        intermediate_size=32,
        num_layers=2,
        pad_token_id=0,
        vocab_size=16,
        time_step_dim=16,
        pos_embed_max_size=16,
        rope_scaling={"long_factor": [1.0] * 8, "short_factor": [1.0] * 8, "type": "su"},
    )
    given, cells = 4, ROWS * COLUMNS
    before = TEXT + given + 1
    mask = torch.ones(before + cells, before + cells).tril()
    mask[TEXT : TEXT + given, TEXT : TEXT + given] = 1
    mask[before:, before:] = 1
    mask = mask.repeat(2, 1, 1)
    mask[1, :, :2] = 0  # padding on the left
    mask[1, :2, :2] = torch.eye(2)
    inputs = dict(
        hidden_states=draw(2, 4, 2 * ROWS, 2 * COLUMNS),
        timestep=TIME,
        input_ids=torch.arange(2 * (TEXT + given)).view(2, -1) % 16,
        input_img_latents=[draw(1, 4, 4, 4), -draw(1, 4, 4, 4)],
        input_image_sizes={0: [[TEXT, TEXT + given]], 1: [[TEXT, TEXT + given]]},
        attention_mask=mask,
        position_ids=torch.arange(before + cells).repeat(2, 1),
    )
    return Tiny(model, inputs, {r"layers\.\d+\.self_attn": (Tokens(before, 1, ROWS, COLUMNS),)})


def hidream() -> Tiny:
    """An image that is no square is padded to the largest size; three texts lie behind."""
    model = _make(
        "HiDreamImageTransformer2DModel",
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        caption_channels=[12, 8],
        text_emb_dim=8,
        num_routed_experts=2,
        num_activated_experts=1,
        axes_dims_rope=(4, 6, 6),
        max_resolution=(16, 16),
        llama_layers=[0, 1],
        force_inference_output=True,
    )
    inputs = dict(
        hidden_states=draw(2, 4, 2 * ROWS, 2 * COLUMNS),
        timesteps=TIME,
        encoder_hidden_states_t5=draw(2, TEXT, 12),
        encoder_hidden_states_llama3=draw(2, 2, 4, 8),
        pooled_embeds=draw(2, 8),
    )
    padding, texts = 64 - ROWS * COLUMNS, TEXT + 4 + 4
    layers = r"(double|single)_stream_blocks\.\d+\.block\.attn1"
    return Tiny(model, inputs, {layers: (Tokens(0, 1, ROWS, COLUMNS, padding + texts),)})


def ideogram4() -> Tiny:
    """Padding, text, image, and a mask that parts the padding from the others."""
    model = _make(
        "Ideogram4Transformer2DModel",
        in_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        intermediate_size=32,
        adaln_dim=8,
        llm_features_dim=12,
        mrope_section=(4, 2, 2),
    )
    total = TEXT + ROWS * COLUMNS
    words = text_mask(TEXT, 3).flip(1)
    ids = torch.zeros(2, total, 3, dtype=torch.long)
    ids[:, TEXT:] = picture_ids().long() + 100
    cells = torch.ones(2, ROWS * COLUMNS, dtype=torch.bool)
    inputs = dict(
        hidden_states=draw(2, total, 4),
        timestep=TIME,
        encoder_hidden_states=draw(2, total, 12),
        position_ids=ids,
        segment_ids=torch.where(torch.cat([words, cells], dim=1), 1, -1),
        indicator=torch.cat([3 * words.long(), 2 * cells.long()], dim=1),
    )
    return Tiny(model, inputs, {r"layers\.\d+\.attention": (IMAGE,)}, select=of_the_image, padding_apart=True)


def of_the_image(output: Any, inputs: dict[str, Any]) -> Any:
    return output[0][inputs["indicator"] == 2]
