"""Other kinds of calls of the further models: those of their other pipelines, or of other steps of a pipeline."""

from collections.abc import Callable
from typing import Any

import torch
from diffusers.models.transformers.transformer_glm_image import GlmImageKVCache
from tiny_model import _JOINT, COLUMNS, ROWS, TEXT, Tiny, Tokens, _without, draw, picture_ids

from . import flux_like, images, videos, wan_like
from .videos import ATTN1, VIDEO

CELLS = 3 * 4 * 5
"""Of the videos."""
BLOCKS = r"blocks\.\d+\.attn1"


def ltx2_text_to_video() -> Tiny:
    """No coordinates: the model makes them from the sizes."""
    tiny = videos.ltx2()
    inputs = {**tiny.inputs, "hidden_states": draw(2, CELLS, 4), "video_coords": None}
    return Tiny(tiny.model, inputs, {ATTN1: (VIDEO,)})


def _ltx2_behind(*parts: torch.Tensor, **changes: Any) -> Tiny:
    """LTX-2 with further tokens behind the video, by their coordinates (1, 3, n, 2)."""
    tiny = videos.ltx2()
    bounds = torch.cat([_bounds(tiny, 3, 4, 5), *parts], dim=2).expand(2, -1, -1, -1)
    total = bounds.shape[2]
    inputs = {
        **tiny.inputs,
        "hidden_states": draw(2, total, 4),
        "video_coords": bounds,
        "timestep": 700 * draw(2, total).sigmoid(),
        "audio_timestep": torch.tensor([700.0, 300.0]),
        **changes,
    }
    return Tiny(tiny.model, inputs, {ATTN1: (Tokens(0, 3, 4, 5, total - CELLS),)})


def _bounds(tiny: Tiny, frames: int, rows: int, columns: int) -> torch.Tensor:
    bounds: torch.Tensor = tiny.model.rope.prepare_video_coords(1, frames, rows, columns, torch.device("cpu"))
    return bounds


def _keyframe(pixel_frame: int) -> torch.Tensor:
    """Bounds of one frame that lasts a single frame of the video, 24 in a second."""
    bounds = _bounds(videos.ltx2(), 1, 4, 5)
    bounds[:, 0, :, 0], bounds[:, 0, :, 1] = pixel_frame / 24, (pixel_frame + 1) / 24
    return bounds


def ltx2_ic_lora() -> Tiny:
    """A keyframe, then a reference of half the size, and a mask that parts those and weakens the reference."""
    reference = _bounds(videos.ltx2(), 3, 2, 3)
    reference[:, 1:] *= 2
    total, key, behind = CELLS + 20 + 18, slice(CELLS, CELLS + 20), slice(CELLS + 20, None)
    mask = torch.ones(1, total, total)
    mask[:, key, behind] = mask[:, behind, key] = 0
    mask[:, :CELLS, behind] = mask[:, behind, :CELLS] = 0.9999
    return _ltx2_behind(_keyframe(8), reference, video_self_attention_mask=mask.expand(2, -1, -1))


def ltx2_slots() -> Tiny:
    """Single frames that are made too, the last at the video's end; no sizes are given."""
    return _ltx2_behind(_keyframe(8), _keyframe(16), **dict.fromkeys(("num_frames", "height", "width")))


def ltx2_tile() -> Tiny:
    """A part of a larger video, with some tokens of a single frame behind."""
    tiny = _ltx2_behind(_keyframe(16)[:, :, 3:17], **dict.fromkeys(("num_frames", "height", "width")))
    whole = _bounds(tiny, 5, 6, 9).view(1, 3, 5, 6, 9, 2)
    part = whole[:, :, 2:5, 1:5, 3:8].flatten(2, 4)
    part = (part - part[..., :1].amin(dim=2, keepdim=True)).expand(2, -1, -1, -1)
    tiny.inputs["video_coords"] = torch.cat([part, tiny.inputs["video_coords"][:, :, CELLS:]], dim=2)
    return tiny


def ltx2_one_frame() -> Tiny:
    """An image with a reference of its size, which is at the same time."""
    tiny = _ltx2_behind()
    image = _bounds(tiny, 1, 4, 5)
    inputs = {**tiny.inputs, "hidden_states": draw(2, 40, 4), "timestep": tiny.inputs["timestep"][:, :40]}
    inputs["video_coords"] = torch.cat([image, image], dim=2).expand(2, -1, -1, -1)
    return Tiny(tiny.model, inputs, {ATTN1: (Tokens(0, 1, 4, 5, 20),)})


def flux3_text_to_image() -> Tiny:
    tiny = flux_like.flux3()
    layouts = {
        r"mode_blocks\.image\.\d+\.attn": (Tokens(0, 1, ROWS, COLUMNS),),
        r"single_transformer_blocks\.\d+\.attn": (Tokens(TEXT, 1, ROWS, COLUMNS),),
    }
    return Tiny(tiny.model, _without(tiny.inputs, "image_cond_hidden_states", "image_cond_ids"), layouts)


def flux3_two_references() -> Tiny:
    """Their ids are scaled, and tell them apart on the last axis."""
    tiny = flux_like.flux3()
    references = [picture_ids(*size, axes=4) for size in ((3, 4), (2, 5))]
    for number, ids in enumerate(references):
        ids[:, 1:3] *= 0.5
        ids[:, 3] = -1 - number
    tiny.inputs |= {"image_cond_ids": torch.cat(references), "image_cond_hidden_states": draw(2, 22, 4)}
    tiny.spatial[r"single_transformer_blocks\.\d+\.attn"] = (Tokens(TEXT, 1, ROWS, COLUMNS, 22),)
    return tiny


def framepack_long_history() -> Tiny:
    """A frame's rows that the coarser patches do not divide; one sample, whose text is cut to what there is of it."""
    tiny = videos.framepack()
    history = {"latents_clean": 2, "latents_history_2x": 2, "latents_history_4x": 16}
    changes: dict[str, Any] = {name: draw(1, 4, frames, 6, 10) for name, frames in history.items()}
    one = {name: value[:1] for name, value in tiny.inputs.items() if "latents" not in name and name != "hidden_states"}
    inputs = {
        **tiny.inputs,
        **one,
        **changes,
        "hidden_states": draw(1, 4, 3, 6, 10),
        "encoder_attention_mask": tiny.inputs["encoder_attention_mask"][1:],
        "indices_latents": torch.arange(20, 23),
        "indices_latents_clean": torch.tensor([0, 19]),
        "indices_latents_history_2x": torch.tensor([17, 18]),
        "indices_latents_history_4x": torch.arange(1, 17),
    }
    before = 2 * 3 * 5 + 2 * 3 + 4 * 1 * 2
    return Tiny(tiny.model, inputs, {_JOINT: (Tokens(before, 3, 3, 5, 2 + 3),)})


def helios_coarse_stage() -> Tiny:
    """The pyramid's first stages are coarser than what was made before."""
    tiny = wan_like.helios()
    tiny.inputs["hidden_states"] = draw(2, 4, 3, 4, 6)
    before = tiny.spatial[BLOCKS][0].before
    return Tiny(tiny.model, tiny.inputs, {BLOCKS: (Tokens(before, 3, 2, 3),)})


def helios_without_history() -> Tiny:
    tiny = wan_like.helios()
    return Tiny(
        tiny.model, {name: value for name, value in tiny.inputs.items() if "history" not in name}, {BLOCKS: (VIDEO,)}
    )


def glm_image_new() -> Tiny:
    """The pipeline gives caches without any image to edit too."""
    tiny = images.glm_image()
    tiny.inputs["kv_caches"] = GlmImageKVCache(num_layers=2)
    return tiny


def ideogram4_unconditional() -> Tiny:
    """The image alone, by the second transformer."""
    tiny = images.ideogram4()
    names = ("hidden_states", "encoder_hidden_states", "position_ids", "segment_ids", "indicator")
    alone = {name: tiny.inputs[name][:, TEXT:] for name in names}
    layouts = {r"layers\.\d+\.attention": (Tokens(0, 1, ROWS, COLUMNS),)}
    return Tiny(tiny.model, {**tiny.inputs, **alone}, layouts, select=tiny.select)


def joy_image_edit() -> Tiny:
    """Two images with an axis of their own: the reference, then the image, which the model takes first."""
    tiny = videos.joy_image()
    tiny.inputs["hidden_states"] = draw(2, 2, 4, 1, 2 * ROWS, 2 * COLUMNS)
    layouts = {r"double_blocks\.\d+\.attn": (Tokens(0, 1, ROWS, COLUMNS, ROWS * COLUMNS + TEXT),)}
    return Tiny(tiny.model, tiny.inputs, layouts)


CALLS: dict[str, tuple[str, Callable[[], Tiny]]] = {
    "LTX-2, text to video": ("LTX-2", ltx2_text_to_video),
    "LTX-2, IC-LoRA": ("LTX-2", ltx2_ic_lora),
    "LTX-2, keyframe slots": ("LTX-2", ltx2_slots),
    "LTX-2, a tile": ("LTX-2", ltx2_tile),
    "LTX-2, one frame": ("LTX-2", ltx2_one_frame),
    "Flux3, text to image": ("Flux3", flux3_text_to_image),
    "Flux3, two references": ("Flux3", flux3_two_references),
    "FramePack, a long history": ("FramePack", framepack_long_history),
    "Helios, a coarse stage": ("Helios", helios_coarse_stage),
    "Helios, no history": ("Helios", helios_without_history),
    "GLM-Image, a new image": ("GLM-Image", glm_image_new),
    "Ideogram4, unconditional": ("Ideogram4", ideogram4_unconditional),
    "JoyImage, an edit": ("JoyImage", joy_image_edit),
}
"""Name -> the model's name in `FURTHER`, and the builder."""
