"""What an upscaling may be set to, checked before anything is computed."""

from dataclasses import dataclass
from typing import Annotated, Literal

from diffattn.options import Help

CELL = 8
"""Pixels of a latent cell."""
MEMORY = "Memory"
COLOR_FIXES = ("adain", "wavelet", None)


@dataclass(frozen=True, kw_only=True)
class UpscaleSettings:
    """Numbers of a run; the defaults are STAR's where it has them, and cross-fades where it cuts.

    The same fields are arguments of `STARPipeline` and options of `diffattn video-upscale`.
    """

    num_inference_steps: Annotated[
        int, Help("Denoising steps; 15 in the scheduler's fast mode means 14 evaluations, as released.", "--steps")
    ] = 15
    guidance_scale: Annotated[
        float, Help("Guidance scale; 1 leaves the negative prompt out, and halves the time.", "--guidance")
    ] = 7.5
    guidance_rescale: float = 0.2
    """From 0 to 1, see `guidance.guide`."""
    window: Annotated[
        int, Help("Frames that are computed together; the networks were trained on 32.", panel=MEMORY)
    ] = 32
    overlap: Annotated[
        int, Help("Frames that windows share at least, and cross-fade in. Default: half a window.", panel=MEMORY)
    ] = 16
    tile: Annotated[
        int | None,
        Help("Side in pixels of the result that is computed at once, rounded up. Default: whole frames.", panel=MEMORY),
    ] = None
    tile_overlap: Annotated[
        int,
        Help("Pixels that neighbouring tiles share at least, and cross-fade in; when decoding too.", panel=MEMORY),
    ] = 64
    encode_chunk: int = 1
    """Frames in one call of the VAE's encoder."""
    decode_chunk: Annotated[int, Help("Frames that the VAE decodes together.", panel=MEMORY)] = 8
    decode_overlap: int = 2
    """Frames that neighbouring chunks share at least, and cross-fade in."""
    decode_tile: Annotated[
        int | None,
        Help(
            "Side in pixels of the result that is decoded at once; group norms see one tile, so tones may differ a "
            "little from those of whole frames. Default: whole frames.",
            panel=MEMORY,
        ),
    ] = None
    color_fix: Annotated[
        Literal["adain", "wavelet"] | None,
        Help(
            "Take the colours of the input: its mean and deviation (adain), its low frequencies (wavelet), or none.",
            "--color",
            metavar="[adain|wavelet|none]",
        ),
    ] = "adain"
    guidance_batch: bool = False
    """Both guidance branches in one call: faster on a GPU, for more memory."""
    official: Annotated[
        bool,
        Help(
            "As the released code: windows of half a window's overlap and up to a quarter longer or shorter at the "
            "end, cut hard; white padding, to 1280 x 720 at least; sampled latents of the clip; frames decoded by "
            "threes. Overlaps in time and the decoded chunk are not looked at."
        ),
    ] = False
    seed: int = 0
    """Of all noise, which depends on seed, frame and step alone."""

    def __post_init__(self) -> None:
        for name in ("num_inference_steps", "window", "encode_chunk", "decode_chunk"):
            self._check(name, getattr(self, name) >= 1, "of at least 1")
        for name, above in (("overlap", "window"), ("decode_overlap", "decode_chunk")):
            number, most = getattr(self, name), getattr(self, above)
            self._check(name, 0 <= number < most or self.official, f"from 0 to below {above}")
        self._check("tile_overlap", self.tile_overlap >= 0, "of at least 0 pixels")
        for name in ("tile", "decode_tile"):
            side, least = getattr(self, name), self.tile_overlap + CELL
            self._check(name, side is None or side >= least, f"{CELL} pixels above tile_overlap, or None")
        self._check("guidance_scale", 0 <= self.guidance_scale < float("inf"), "of at least 0")
        self._check("guidance_rescale", 0 <= self.guidance_rescale <= 1, "from 0 to 1")
        self._check("color_fix", self.color_fix in COLOR_FIXES, "among " + ", ".join(map(repr, COLOR_FIXES)))
        self._check("seed", 0 <= self.seed < 2**64, "from 0 to 2**64 - 1")

    def _check(self, name: str, right: bool, what: str) -> None:
        if not right:
            default = type(self).__dataclass_fields__[name].default
            raise ValueError(f"expected {name} {what}; got {getattr(self, name)!r}; {default!r} is the default")
