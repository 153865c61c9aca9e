"""Video transformers."""

from .layout import Arguments, Family, TokenPath, transformer
from .readers import ltx, video


def one_timestep(call: Arguments) -> str | None:
    """A given first image has a timestep of its own for each token."""
    timestep = call["timestep"]
    return "each token has its own timestep" if timestep.ndim > 1 and timestep.shape[1] > 1 else None


ROWS: tuple[Family, ...] = (
    Family(
        "Wan",
        ("WanTransformer3DModel",),
        transformer(r"blocks\.\d+\.attn1", video(2, before=0, patch_t="patch_size")),
        tokens=TokenPath(("WanTransformer3DModel",), "patch_embedding", "proj_out", "rope", refuses=one_timestep),
    ),
    Family(
        "HunyuanVideo",
        ("HunyuanVideoTransformer3DModel",),
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
)
