"""Audio transformers: windows and tiles lie along the time."""

from .layout import Family
from .lines import along_time, line

ROWS: tuple[Family, ...] = (
    Family(
        "Stable Audio",
        ("StableAudioDiTModel",),
        along_time(r"transformer_blocks\.\d+\.attn1", line(axis=2, before=1)),
    ),
    # each layer attends twice and takes the difference
    Family(
        "Stable Audio 3",
        ("StableAudio3DiTModel",),
        along_time(r"transformer_blocks\.\d+\.self_attn", line(axis=2, before="num_memory_tokens", patch="patch_size")),
    ),
    # every other layer has a window of its own
    Family(
        "ACE-Step",
        ("AceStepTransformer1DModel",),
        along_time(
            r"layers\.\d+\.self_attn", line(axis=1, patch="patch_size"), mask="queries", masked_by="sliding_window"
        ),
    ),
    Family(
        "LongCat-Audio",
        ("LongCatAudioDiTTransformer",),
        along_time(r"blocks\.\d+\.self_attn", line(axis=1)),
    ),
    # the time of denoising is a token of its own
    Family(
        "MiniMax-Music3",
        ("MiniMaxMusic3Transformer1DModel",),
        along_time(r"transformer_blocks\.\d+\.attn", line(axis=2, before=1)),
    ),
)
