"""Models that are built as Flux is."""

import torch
from tiny_model import (
    _FLUX,
    _JOINT,
    COLUMNS,
    ROWS,
    TEXT,
    TIME,
    Tiny,
    Tokens,
    _flux_inputs,
    _make,
    _without,
    draw,
    picture_ids,
    text_mask,
)

IMAGE = Tokens(TEXT, 1, ROWS, COLUMNS)


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


def bria_fibo() -> Tiny:
    """Each block gets a text of its own."""
    config = {**_FLUX, "pooled_projection_dim": None, "axes_dims_rope": [4, 6, 6]}
    model = _make("BriaFiboTransformer2DModel", **config, text_encoder_dim=12)
    inputs = {**_without(_flux_inputs(), "pooled_projections"), "text_encoder_layers": [draw(2, TEXT, 12)] * 4}
    return Tiny(model, inputs, {_JOINT: (IMAGE,)})


def ovis_image() -> Tiny:
    config = _without(_FLUX, "pooled_projection_dim")
    model = _make("OvisImageTransformer2DModel", **config, out_channels=4)
    return Tiny(model, _without(_flux_inputs(), "pooled_projections"), {_JOINT: (IMAGE,)})


def longcat_image() -> Tiny:
    """Ids with an offset, and a reference behind, as its edits have it."""
    model = _make(
        "LongCatImageTransformer2DModel", **{**_FLUX, "pooled_projection_dim": 12, "axes_dims_rope": [4, 6, 6]}
    )
    reference = picture_ids(3, 4)
    own, reference[:, 0] = picture_ids(), 2
    own[:, 0] = 1
    ids = torch.cat([own, reference])
    ids[:, 1:] += 512
    inputs = {**_without(_flux_inputs(len(ids)), "pooled_projections"), "img_ids": ids}
    return Tiny(model, inputs, {_JOINT: (Tokens(TEXT, 1, ROWS, COLUMNS, 12),)})


def flux3() -> Tiny:
    """The image has blocks to itself first; a reference comes by arguments of its own, and lies behind."""
    model = _make(
        "Flux3Transformer2DModel",
        in_channels=4,
        cond_in_channels=4,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=12,
        timestep_channels=16,
        axes_dims_rope=(4, 4, 4, 4),
    )
    reference = picture_ids(3, 4, axes=4)
    reference[:, 0] = 10
    inputs = dict(
        hidden_states=draw(2, ROWS * COLUMNS, 4),
        encoder_hidden_states=draw(2, TEXT, 12),
        timestep=TIME,
        img_ids=0.5 * picture_ids(axes=4),
        txt_ids=torch.zeros(TEXT, 4),
        image_cond_hidden_states=draw(2, 12, 4),
        image_cond_ids=reference,
    )
    layouts = {
        r"mode_blocks\.image\.\d+\.attn": (Tokens(0, 1, ROWS, COLUMNS),),
        r"single_transformer_blocks\.\d+\.attn": (Tokens(TEXT, 1, ROWS, COLUMNS, 12),),
    }
    return Tiny(model, inputs, layouts)


def bria_fibo2() -> Tiny:
    """A batch with gists of two lengths, which lie behind then, padded."""
    model = _make(
        "BriaFibo2Transformer2DModel",
        in_channels=4,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        cap_feat_dim=12,
        injection_layer_ids=(1,),
        perceiver_num_layers=1,
        min_num_gist_tokens=2,
        max_num_gist_tokens=6,
        gist_step=2,
        gist_min_text_len=1,
        gist_max_text_len=TEXT,
        axes_dims=(4, 6, 6),
        axes_lens=(16, 16, 16),
    )
    inputs = dict(
        hidden_states=draw(2, 4, 2 * ROWS, 2 * COLUMNS),
        timestep=TIME,
        encoder_hidden_states=draw(2, 2, TEXT, 12),
        encoder_attention_mask=text_mask(TEXT, 3),
    )
    layouts = {
        r"noise_refiner\.\d+\.attention": (Tokens(0, 1, ROWS, COLUMNS),),
        r"layers\.\d+\.attention": (Tokens(0, 1, ROWS, COLUMNS, 6),),
    }
    return Tiny(model, inputs, layouts)


def bria_fibo2_edit() -> Tiny:
    """Gists of one length before the image, the image that is edited behind it."""
    tiny = bria_fibo2()
    tiny.inputs |= {"encoder_attention_mask": text_mask(TEXT, TEXT), "context_latents": [draw(2, 4, 6, 8)]}
    tiny.spatial = {
        r"noise_refiner\.\d+\.attention": (Tokens(0, 1, ROWS, COLUMNS, 12),),
        r"layers\.\d+\.attention": (Tokens(6, 1, ROWS, COLUMNS, 12),),
    }
    return tiny
