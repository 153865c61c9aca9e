"""Values for the arguments that pipelines pass and that the tiny models' own inputs leave out."""

import functools
from collections.abc import Callable
from typing import Any

import models
import torch
from models import COLUMNS, ROWS, TEXT, Tiny, draw
from torch import Tensor

Value = Callable[[Tiny], Any]


def residuals(tiny: Tiny) -> list[Tensor]:
    """One for each block of a transformer whose width is 32: (b, tokens, c), references among them."""
    return [0.3 * draw(2, tiny.inputs["hidden_states"].shape[1], 32)] * 2


@functools.cache
def _levels(name: str) -> tuple[tuple[Tensor, ...], Tensor]:
    """What a UNet's ControlNet gives: residuals of all levels, and of the middle."""
    control = models.BUILDERS[name]()
    with torch.no_grad():
        down, middle = control.model(**control.inputs, return_dict=False)
    return tuple(down), middle


def of_controlnet(tiny: Tiny) -> str:
    return "SparseCtrl-ControlNet" if type(tiny.model).__name__ == "UNetMotionModel" else "SD-ControlNet"


def _of_adapter(first: str) -> list[Tensor]:
    """A T2I adapter's features for each block; one without attention takes them after its resampling."""
    return [draw(2, 8, 8, 12) if "CrossAttn" in first else draw(2, 8, 4, 6), draw(2, 16, 4, 6)]


def guidance(tiny: Tiny) -> Tensor | None:
    """A pipeline passes it to models that are distilled for it, and None to others."""
    has = tiny.model.config.get("guidance_embeds") or tiny.model.config.get("guidance_embed")
    return torch.ones(2) if has else None


def always(value: Any) -> Value:
    return lambda tiny: value


PLAIN: dict[str, Value] = {
    "guidance": guidance,
    # where a pipeline is given none, they are None or empty
    "attention_kwargs": always(None),
    "joint_attention_kwargs": always(None),
    "cross_attention_kwargs": always(None),
    "added_cond_kwargs": always(None),
    "class_labels": always(None),
    "timestep_cond": always(None),
    "conditioning_scale": always(0.7),
    "guess_mode": always(False),
    "fps": always(24),
}
"""Argument -> its value for any model."""

IMPOSSIBLE = {"UNet-added-keys": "down_intrablock_additional_residuals"}
"""Tiny model -> an argument that its blocks don't take, which its class has."""

VALUES: dict[str, dict[str, Value]] = {
    "UNet2DConditionModel": {
        "down_block_additional_residuals": lambda tiny: _levels(of_controlnet(tiny))[0],
        "mid_block_additional_residual": lambda tiny: _levels(of_controlnet(tiny))[1],
        "down_intrablock_additional_residuals": lambda tiny: _of_adapter(tiny.model.config["down_block_types"][0]),
        # unCLIP's, on text among the keys of blocks that have no layer to swap
        "attention_mask": always(None),
    },
    "UNetMotionModel": {
        "down_block_additional_residuals": lambda tiny: _levels(of_controlnet(tiny))[0],
        "mid_block_additional_residual": lambda tiny: _levels(of_controlnet(tiny))[1],
    },
    "ControlNetModel": {},
    "UNetControlNetXSModel": {"apply_control": always(True)},
    "AudioLDM2UNet2DConditionModel": {
        "encoder_hidden_states_1": lambda tiny: draw(2, 3, 12),
        "encoder_attention_mask_1": lambda tiny: models.text_mask(3, 2),
    },
    "FluxTransformer2DModel": {
        "controlnet_block_samples": residuals,
        "controlnet_single_block_samples": residuals,
        "controlnet_blocks_repeat": always(False),
        "kv_cache": always(None),
    },
    "FluxControlNetModel": {"controlnet_mode": always(None)},
    "SD3Transformer2DModel": {
        "block_controlnet_hidden_states": lambda tiny: [0.3 * draw(2, ROWS * COLUMNS, 16)],
        # a block that is left out has no call; the pipeline itself is run with one
        "skip_layers": always([]),
    },
    "QwenImageTransformer2DModel": {
        "controlnet_block_samples": residuals,
        "additional_t_cond": always(None),
    },
    "ZImageTransformer2DModel": {
        # of the first block: the cells of an image and its caption, padded
        "controlnet_block_samples": always(None),
    },
    "HunyuanDiT2DModel": {
        "controlnet_block_samples": lambda tiny: [0.3 * draw(2, ROWS * COLUMNS, 16)],
    },
    "CosmosTransformer3DModel": {
        "padding_mask": lambda tiny: torch.zeros(1, 1, 16, 20),
        "block_controlnet_hidden_states": lambda tiny: [0.3 * draw(2, 60, 32)] * 2,
    },
    "CogVideoXTransformer3DModel": {"ofs": always(None), "image_rotary_emb": always(None)},
    "ConsisIDTransformer3DModel": {
        # read by models that were trained on faces
        "image_rotary_emb": always(None),
        "id_cond": always(None),
        "id_vit_hidden": always(None),
    },
    "WanVACETransformer3DModel": {"control_hidden_states_scale": lambda tiny: torch.tensor([0.7, 0.3])},
    "WanAnimateTransformer3DModel": {"motion_encode_batch_size": always(2)},
    "GlmImageTransformer2DModel": {"kv_caches": always(None)},
    "Kandinsky5Transformer3DModel": {"scale_factor": always((1.0, 2.0, 2.0)), "sparse_params": always(None)},
    "Kandinsky6Transformer3DModel": {"encoder_attention_mask": lambda tiny: models.text_mask(TEXT, 3)},
    "LatteTransformer3DModel": {"enable_temporal_attentions": always(True)},
    "LTXVideoTransformer3DModel": {"rope_interpolation_scale": always((0.3, 32.0, 32.0))},
    "LTX2VideoTransformer3DModel": {
        "isolate_modalities": always(False),
        "spatio_temporal_guidance_blocks": always(None),
        "perturbation_mask": always(None),
        "use_cross_timestep": always(False),
        "sigma": lambda tiny: torch.tensor([700.0, 300.0]),
        "audio_sigma": lambda tiny: torch.tensor([700.0, 300.0]),
        "audio_timestep": lambda tiny: torch.tensor([700.0, 300.0]),
        "encoder_attention_mask": lambda tiny: models.text_mask(TEXT, 3).float(),
        "audio_encoder_attention_mask": lambda tiny: models.text_mask(4, 2).float(),
        "audio_coords": lambda tiny: tiny.model.audio_rope.prepare_audio_coords(2, 7, torch.device("cpu")),
        "video_keyframes_mask": lambda tiny: torch.zeros(2, 80, 1),
        "video_self_attention_mask": lambda tiny: _between_references(80, 60),
    },
    "Flux2Transformer2DModel": {"kv_cache": always(None), "kv_cache_mode": always(None)},
    "QwenImage21Transformer2DModel": {"kv_cache": always(None), "kv_cache_mode": always(None)},
    # none of the actions of a robot
    "Cosmos3OmniTransformer": dict.fromkeys(
        [f"action_{part}_indexes" for part in ("mse_loss", "noisy_frame", "sequence")]
        + ["action_domain_ids", "action_timesteps", "action_token_shapes", "action_tokens"],
        always(None),
    ),
    # of the prior, and of the decoder
    "StableCascadeUNet": dict.fromkeys(["clip_img", "clip_text", "effnet"], always(None)),
    "UniDiffuserModel": {"data_type": always(1)},
    "HunyuanVideo15Transformer3DModel": {"timestep_r": always(None)},
    "HunyuanImageTransformer2DModel": {"timestep_r": always(None)},
    "EasyAnimateTransformer3DModel": {},
    "AllegroTransformer3DModel": {
        "encoder_attention_mask": lambda tiny: models.text_mask(TEXT, 3).long(),
    },
    "DreamLiteUNetModel": {"encoder_attention_mask": lambda tiny: models.text_mask(TEXT, 3)},
    "SkyReelsV2Transformer3DModel": {},
    "DiTTransformer2DModel": {},
}
"""Class of a model -> argument -> its value."""


def _between_references(tokens: int, cells: int) -> Tensor:
    """A reference behind the cells is seen by half, as IC-LoRA's references may be."""
    mask = torch.ones(2, tokens, tokens)
    mask[:, :cells, cells:] = mask[:, cells:, :cells] = 0.9999
    return mask
