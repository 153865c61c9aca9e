"""Video transformers."""

from .given_images import kandinsky6
from .layout import Arguments, Family, Layers, TokenPath, transformer
from .packed import minimax_h3
from .readers import channels_last, cosmos3, frames_on, joy_image, ltx, picture, video
from .video_readers import framepack, helios, ltx2


def one_timestep(call: Arguments) -> str | None:
    """A given first image has a timestep of its own for each token."""
    timestep = call["timestep"]
    return "each token has its own timestep" if timestep.ndim > 1 and timestep.shape[1] > 1 else None


ROWS: tuple[Family, ...] = (
    Family(
        "Wan",
        (
            "WanTransformer3DModel",
            "WanVACETransformer3DModel",
            "WanAnimateTransformer3DModel",
            "ChronoEditTransformer3DModel",
            "SkyReelsV2Transformer3DModel",
        ),
        transformer(r"(vace_)?blocks\.\d+\.attn1", video(2, before=0, patch_t="patch_size")),
        tokens=TokenPath(("WanTransformer3DModel",), "patch_embedding", "proj_out", "rope", refuses=one_timestep),
    ),
    Family(
        "HunyuanVideo",
        ("HunyuanVideoTransformer3DModel", "HunyuanVideo15Transformer3DModel", "MotifVideoTransformer3DModel"),
        transformer(
            r"(single_)?transformer_blocks\.\d+\.attn",
            video(2, before=0, after=None, patch_t="patch_size_t"),
            mask="padding",
        ),
        rope="rope",
    ),
    Family(
        "FramePack",
        ("HunyuanVideoFramepackTransformer3DModel",),
        transformer(r"(single_)?transformer_blocks\.\d+\.attn", framepack),
    ),
    Family(
        "LTX",
        ("LTXVideoTransformer3DModel",),
        transformer(r"transformer_blocks\.\d+\.attn1", ltx),
        rope="rope",
        tokens=TokenPath(("LTXVideoTransformer3DModel",), "proj_in", "proj_out", "rope", refuses=one_timestep),
    ),
    Family("LTX-2", ("LTX2VideoTransformer3DModel",), transformer(r"transformer_blocks\.\d+\.attn1", ltx2)),
    Family(
        "CogVideoX",
        ("CogVideoXTransformer3DModel",),
        transformer(r"transformer_blocks\.\d+\.attn1", video(1, patch_t="patch_size_t")),
    ),
    Family("ConsisID", ("ConsisIDTransformer3DModel",), transformer(r"transformer_blocks\.\d+\.attn1", video(1))),
    Family(
        "Mochi",
        ("MochiTransformer3DModel",),
        transformer(r"transformer_blocks\.\d+\.attn1", video(2, before=0, after=None)),
    ),
    Family(
        "AnyFlow",
        ("AnyFlowTransformer3DModel",),
        transformer(r"blocks\.\d+\.attn1", video(1, before=0, patch_t="patch_size")),
    ),
    Family(
        "Allegro",
        ("AllegroTransformer3DModel",),
        transformer(r"transformer_blocks\.\d+\.attn1", video(2, before=0, patch_t="patch_size_t")),
    ),
    Family(
        "Latte",
        ("LatteTransformer3DModel",),
        (
            Layers(r"transformer_blocks\.\d+\.attn1", "spatial", picture(before=0)),
            Layers(r"temporal_transformer_blocks\.\d+\.attn1", "temporal", frames_on(2)),
        ),
    ),
    # (b, c, frames, height, width), or with an axis of images before c, of which the last is made and lies first
    Family(
        "JoyImage",
        ("JoyImageEditTransformer3DModel",),
        transformer(r"double_blocks\.\d+\.attn", video(-3, before=0, after=None, patch_t="patch_size")),
    ),
    Family(
        "JoyImage-Plus",
        ("JoyImageEditPlusTransformer3DModel",),
        transformer(r"double_blocks\.\d+\.attn", joy_image),
    ),
    Family(
        "Kandinsky5",
        ("Kandinsky5Transformer3DModel",),
        transformer(r"visual_transformer_blocks\.\d+\.self_attention", channels_last),
    ),
    Family(
        "Kandinsky6",
        ("Kandinsky6Transformer3DModel",),
        transformer(r"visual_transformer_blocks\.\d+\.video_dec_block\.self_attention", kandinsky6),
    ),
    # frames that were made before lie before
    Family(
        "Helios",
        ("HeliosTransformer3DModel",),
        transformer(r"blocks\.\d+\.attn1", helios),
    ),
    Family(
        "Cosmos",
        ("CosmosTransformer3DModel",),
        transformer(r"transformer_blocks\.\d+\.attn1", video(2, before=0, patch_t="patch_size")),
    ),
    Family("MiniMax-H3", ("MiniMaxH3Transformer3DModel",), transformer(r"transformer_blocks\.\d+\.attn", minimax_h3)),
    Family("EasyAnimate", ("EasyAnimateTransformer3DModel",), transformer(r"transformer_blocks\.\d+\.attn1", video(2))),
    Family(
        "Cosmos 3",
        ("Cosmos3OmniTransformer",),
        transformer(r"layers\.\d+\.self_attn", cosmos3, fewer_queries=True, has_features=False),
        timestep="vision_timesteps",
    ),
)
