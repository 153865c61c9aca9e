"""Video transformers."""

from .layout import Arguments, Family, Layers, TokenPath, transformer
from .readers import channels_last, frames_on, ltx, picture, video


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
        ("HunyuanVideoTransformer3DModel", "HunyuanVideo15Transformer3DModel"),
        transformer(r"(single_)?transformer_blocks\.\d+\.attn", video(2, before=0, after=None, patch_t="patch_size_t")),
        rope="rope",
    ),
    Family(
        "LTX",
        ("LTXVideoTransformer3DModel",),
        transformer(r"transformer_blocks\.\d+\.attn1", ltx),
        rope="rope",
        tokens=TokenPath(("LTXVideoTransformer3DModel",), "proj_in", "proj_out", "rope", refuses=one_timestep),
    ),
    Family(
        "CogVideoX",
        ("CogVideoXTransformer3DModel",),
        transformer(r"transformer_blocks\.\d+\.attn1", video(1, patch_t="patch_size_t")),
    ),
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
    Family(
        "Kandinsky5",
        ("Kandinsky5Transformer3DModel",),
        transformer(r"visual_transformer_blocks\.\d+\.self_attention", channels_last),
    ),
    Family(
        "Cosmos",
        ("CosmosTransformer3DModel",),
        transformer(r"transformer_blocks\.\d+\.attn1", video(2, before=0, patch_t="patch_size")),
    ),
    Family("EasyAnimate", ("EasyAnimateTransformer3DModel",), transformer(r"transformer_blocks\.\d+\.attn1", video(2))),
)
