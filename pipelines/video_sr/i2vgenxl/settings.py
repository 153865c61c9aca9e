"""What an upscaling may be set to, checked before anything is computed."""

from dataclasses import dataclass
from typing import Literal

from .padding import CELL

COLOR_FIXES = ("adain", "wavelet", None)


@dataclass(frozen=True, kw_only=True)
class UpscaleSettings:
    """Numbers of a run; the defaults are STAR's where it has them, and cross-fades where it cuts."""

    num_inference_steps: int = 15
    """15 in the scheduler's fast mode means 14 evaluations, as released."""
    guidance_scale: float = 7.5
    """1 leaves the half with the negative prompt out, which halves the time."""
    guidance_rescale: float = 0.2
    """From 0 to 1, see `guidance.guide`."""
    window: int = 32
    """Frames that the networks see together; they were trained on 32."""
    overlap: int = 16
    """Frames that neighbouring windows share at least, and cross-fade in."""
    tile: int | None = None
    """Side of the tiles that the networks see, in pixels of the output, rounded up to a legal size; None: whole frames.
    """
    tile_overlap: int = 64
    """Pixels that neighbouring tiles share at least, and cross-fade in; those of `decode_tile` too."""
    encode_chunk: int = 1
    """Frames in one call of the VAE's encoder."""
    decode_chunk: int = 8
    """Frames that the VAE's decoder sees together."""
    decode_overlap: int = 2
    """Frames that neighbouring chunks share at least, and cross-fade in."""
    decode_tile: int | None = None
    """Side of the tiles that the decoder sees, in pixels of the output. Its group norms see one tile at a time, so
    tones may differ a little from those of whole frames."""
    color_fix: Literal["adain", "wavelet"] | None = "adain"
    """Colours of the low-resolution clip: its mean and deviation, or its low frequencies."""
    guidance_batch: bool = False
    """Both halves of guidance in one call: faster on a GPU, for more memory."""
    official: bool = False
    """As the released code: windows of half a window's overlap and up to a quarter longer or shorter at the end, cut
    hard; white padding, to 1280 x 720 at least; sampled latents of the clip; frames decoded by threes. Overlaps in time
    and `decode_chunk` are not looked at."""
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
