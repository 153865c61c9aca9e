"""How a portrait is animated, checked before anything is computed."""

import math
from dataclasses import dataclass
from typing import Annotated, Literal

from diffattn.options import Help, Must, check_fields

from ..sampling.start import official_timesteps

FACES = "Faces"
FRAME = Must("best, none or the number of a frame", lambda frame: isinstance(frame, str) or frame >= 0)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """With the files, all that the video depends on. The same fields are options of `diffattn animate`."""

    steps: Annotated[int, Help("Denoising steps, from 1 to 1000.")] = 30
    guidance: Annotated[float, Help("Guidance scale; 1 for none.")] = 5.0
    seed: int = 0
    window: Annotated[int, Help("Frames that are computed together.")] = 16
    overlap: Annotated[int, Help("Frames that neighbouring windows share.")] = 4
    best_frame: Annotated[
        int | Literal["best", "none"],
        FRAME,
        Help(
            "Frame, of those used, whose face is laid onto the source's; best for the nearest one, none to leave the "
            "frames as they are.",
            panel=FACES,
        ),
    ] = "best"
    face: Annotated[
        int | None, Help("Face of the driving video, from the left. Default: the largest.", panel=FACES)
    ] = None
    no_face: Annotated[
        Literal["hold", "blank"], Help("Frames without a face take the one before, or show none.", panel=FACES)
    ] = "hold"
    scale_patches: Annotated[
        bool, Help("Cut eyes and mouth out as large as the face is, not in the released code's one size.", panel=FACES)
    ] = False
    paste: Annotated[
        bool | None,
        Help(
            "Animate a square around the face and put it back into the image; or all of the image, stretched to "
            "the networks' square, which the result keeps. Default: --paste, but for --official.",
            "--paste/--no-paste",
        ),
    ] = None
    official: Annotated[bool, Help("The released code's windows, which go round the end of the video.")] = False

    def __post_init__(self) -> None:
        if not 1.0 <= self.guidance < math.inf:
            raise ValueError(f"expected --guidance from 1, which is none; got {self.guidance}; 5 is usual")
        check_fields(self)
        official_timesteps(self.steps)
        if not 0 <= self.overlap < self.window:
            raise ValueError(
                f"expected --overlap from 0 to below --window; got {self.overlap} and {self.window}; 4 and 16 are usual"
            )
        if self.face is not None and self.face < 0:
            raise ValueError(f"expected --face from 0; got {self.face}; 0 is the leftmost")

    @property
    def pastes(self) -> bool:
        """`paste`, or its default."""
        return not self.official if self.paste is None else self.paste
