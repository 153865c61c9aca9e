"""Tiny models in forms that pipelines need and the rows' own tests do not: other arguments, tokens or channels."""

from collections.abc import Callable
from typing import Any

import models
import torch
from further import videos, wan_like
from further.images import hunyuan_image, hunyuan_image_refiner
from models import TEXT, Tiny, Tokens, draw
from tiny_model import _WAN, _make, _wan_inputs, _without


def _given_image(name: str, **config: Any) -> Tiny:
    """Wan's cross-attention to a given image."""
    model = _make(name, **_WAN, image_dim=8, added_kv_proj_dim=24, **config)
    inputs = {**_wan_inputs(), "encoder_hidden_states_image": draw(2, 4, 8)}
    return Tiny(model, inputs, {r"blocks\.\d+\.attn1": (Tokens(0, 3, 4, 5),)})


def skyreels_forcing() -> Tiny:
    """Each frame has a time of its own."""
    tiny = wan_like.skyreels_v2()
    tiny.inputs |= {
        "timestep": torch.tensor([[7, 5, 3], [6, 4, 2]]),
        "enable_diffusion_forcing": True,
        "fps": [1, 0],
    }
    return tiny


def ltx_coordinates() -> Tiny:
    """The video is placed by coordinates alone."""
    tiny = models.ltx()
    axes = torch.meshgrid(*(torch.arange(size).float() for size in (3, 4, 5)), indexing="ij")
    coordinates = torch.stack(axes).flatten(1).expand(2, -1, -1)
    tiny.inputs = {**_without(tiny.inputs, "num_frames", "height", "width"), "video_coords": coordinates}
    return tiny


def ltx_both() -> Tiny:
    """A size, and coordinates."""
    tiny, other = models.ltx(), ltx_coordinates()
    tiny.inputs["video_coords"] = other.inputs["video_coords"]
    return tiny


def hunyuan_image_two_texts() -> Tiny:
    """A second text for letters that are drawn; it lies before the first."""
    tiny = hunyuan_image()
    config = {**tiny.model.config, "text_embed_2_dim": 10}
    tiny.model = _make("HunyuanImageTransformer2DModel", **_plain(config))
    tiny.inputs |= {
        "encoder_hidden_states_2": draw(2, 4, 10),
        "encoder_attention_mask_2": models.text_mask(4, 2),
    }
    [(layer, [layout])] = tiny.spatial.items()
    tiny.spatial = {layer: (Tokens(0, 1, layout.rows, layout.columns, TEXT + 4),)}
    return tiny


def hunyuan_refiner() -> Tiny:
    """Distilled for guidance."""
    tiny = hunyuan_image_refiner()
    tiny.model = _make("HunyuanImageTransformer2DModel", **_plain({**tiny.model.config, "guidance_embeds": True}))
    tiny.inputs["guidance"] = torch.ones(2)
    return tiny


def motif_text() -> Tiny:
    """Without an image."""
    tiny = videos.motif_video()
    tiny.inputs = _without(tiny.inputs, "image_embeds")
    tiny.spatial = {
        r"(single_)?transformer_blocks\.0\.attn": (Tokens(0, 3, 4, 5, TEXT),),
        r"single_transformer_blocks\.1\.attn": (Tokens(0, 3, 4, 5, 60),),
    }
    return tiny


def kandinsky6_image() -> Tiny:
    """A given image behind the frames, at the place of the first."""
    tiny = videos.kandinsky6()
    config = {**tiny.model.config, "visual_token_type_num_embeddings": 2}
    tiny.model = _make("Kandinsky6Transformer3DModel", **_plain(config))
    types = torch.zeros(2, 4, dtype=torch.long)
    types[:, -1] = 1
    tiny.inputs |= {
        "hidden_states": draw(2, 4, 8, 10, 4),
        "visual_token_type_ids": types,
        "visual_rope_pos": (torch.tensor([0, 1, 2, 0]), torch.arange(4), torch.arange(5)),
    }
    tiny.spatial = {key: (Tokens(0, 3, 4, 5, 20),) for key in tiny.spatial}
    return tiny


def joy_image_items() -> Tiny:
    """A given image before the one that is made; the model puts the latter first."""
    tiny = videos.joy_image()
    tiny.inputs["hidden_states"] = draw(2, 2, 4, 1, 2 * models.ROWS, 2 * models.COLUMNS)
    cells = models.ROWS * models.COLUMNS
    tiny.spatial = {key: (Tokens(0, 1, models.ROWS, models.COLUMNS, cells + TEXT),) for key in tiny.spatial}
    return tiny


def easy_animate(argument: str) -> Tiny:
    """Latents of a control or of what is kept, as further channels."""
    tiny = videos.easy_animate()
    tiny.model = _make("EasyAnimateTransformer3DModel", **_plain({**tiny.model.config, "in_channels": 8}))
    tiny.inputs[argument] = draw(2, 4, 3, 8, 10)
    return tiny


def cosmos_condition() -> Tiny:
    """A mask of the given frames as a further channel, and a time for each frame."""
    tiny = videos.cosmos()
    tiny.model = _make(
        "CosmosTransformer3DModel", **_plain({**tiny.model.config, "in_channels": 5, "controlnet_block_every_n": 1})
    )
    tiny.inputs |= {
        "condition_mask": torch.ones(2, 1, 3, 8, 10),
        "timestep": torch.rand(2, 1, 3, 1, 1, generator=torch.Generator().manual_seed(0)),
    }
    return tiny


def allegro_positions() -> Tiny:
    """Rotary embeddings from the pipeline: for each axis the angles of the cells."""
    tiny = videos.allegro()
    axes = torch.meshgrid(*(torch.arange(size) for size in (3, 4, 5)), indexing="ij")
    angles = [torch.arange(size)[:, None] / 10 ** torch.arange(2) for size in (3, 4, 5)]
    frequencies = tuple((angle.cos().repeat(1, 2), angle.sin().repeat(1, 2)) for angle in angles)
    tiny.inputs["image_rotary_emb"] = (frequencies, tuple(axis.flatten()[None] for axis in axes))
    return tiny


def unet2d_classes() -> Tiny:
    """Consistency models that were trained with classes."""
    tiny = models.BUILDERS["UNet2D"]()
    tiny.model = _make("UNet2DModel", **_plain({**tiny.model.config, "num_class_embeds": 4}))
    tiny.inputs["class_labels"] = torch.tensor([1, 2])
    return tiny


def ltx2_coordinates() -> Tiny:
    """A video and its keyframes placed by coordinates alone."""
    tiny = videos.ltx2()
    tiny.inputs = _without(tiny.inputs, "num_frames", "height", "width")
    return tiny


def _plain(config: Any) -> dict[str, Any]:
    """A config without what diffusers notes in it."""
    return {key: value for key, value in config.items() if not key.startswith("_")}


def chroma_numbers() -> Tiny:
    """Its pipelines' mask has numbers, which are added to the scores: padding is weighed less, and not hidden."""
    tiny = models.BUILDERS["Chroma"]()
    tiny.inputs["attention_mask"] = tiny.inputs["attention_mask"].float()
    return tiny


VARIANTS: dict[str, Callable[[], Tiny]] = {
    "Wan, a given image": lambda: _given_image("WanTransformer3DModel"),
    "ChronoEdit, a given image": lambda: _given_image("ChronoEditTransformer3DModel"),
    "SkyReels-V2, a given image": lambda: _given_image("SkyReelsV2Transformer3DModel"),
    "SkyReels-V2, forcing": skyreels_forcing,
    "Chroma, a mask of numbers": chroma_numbers,
    "LTX, coordinates": ltx_coordinates,
    "LTX, size and coordinates": ltx_both,
    "LTX-2, coordinates": ltx2_coordinates,
    "HunyuanImage, two texts": hunyuan_image_two_texts,
    "HunyuanImage-refiner, guidance": hunyuan_refiner,
    "Motif-Video, text alone": motif_text,
    "Kandinsky6, a given image": kandinsky6_image,
    "JoyImage, a given image": joy_image_items,
    "EasyAnimate, control": lambda: easy_animate("control_latents"),
    "EasyAnimate, inpainting": lambda: easy_animate("inpaint_latents"),
    "Cosmos, given frames": cosmos_condition,
    "Allegro, positions": allegro_positions,
    "UNet2D, classes": unet2d_classes,
}
"""Name -> builder."""

NEWER = {"JoyImage, a given image": "0.39", "Kandinsky6, a given image": "0.42", "Motif-Video, text alone": "0.39"}
"""Those that the lowest diffusers does not have -> the first release that does."""
