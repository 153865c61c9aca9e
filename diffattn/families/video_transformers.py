"""Video transformers."""

from .layout import Family, transformer
from .readers import ltx, video

ROWS: tuple[Family, ...] = (
    Family(
        "Wan", ("WanTransformer3DModel",), transformer(r"blocks\.\d+\.attn1", video(2, before=0, patch_t="patch_size"))
    ),
    Family(
        "HunyuanVideo",
        ("HunyuanVideoTransformer3DModel",),
        transformer(r"(single_)?transformer_blocks\.\d+\.attn", video(2, before=0, after=None, patch_t="patch_size_t")),
        rope="rope",
    ),
    Family("LTX", ("LTXVideoTransformer3DModel",), transformer(r"transformer_blocks\.\d+\.attn1", ltx), rope="rope"),
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
)
