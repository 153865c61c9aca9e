"""Captioned images made by formula: one coloured shape at one of nine places on a plain or striped background.

The whole world is `Scene`: colour, shape, place, background colour, size and texture. `render` draws a scene as an
RGB image, `captions` says it in words, and `is_held_out` names the combinations that training never sees.
"""

import itertools
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

SIDE = 128
"""Side of an image in pixels."""

PALETTE: dict[str, tuple[int, int, int]] = {
    "red": (215, 35, 40),
    "orange": (250, 140, 20),
    "yellow": (250, 225, 50),
    "green": (35, 150, 65),
    "cyan": (70, 205, 220),
    "blue": (35, 75, 205),
    "purple": (135, 50, 170),
    "white": (245, 245, 245),
}
"""RGB of each colour name, 0..255."""

SHAPES = ("circle", "square", "triangle", "diamond", "cross", "ring")
SIZES: dict[str, float] = {"small": 15.0, "large": 23.0}
"""Nominal radius in pixels of each size."""

TEXTURES = ("plain", "striped")
PLACES: dict[str, tuple[int, int]] = {
    "at the top left": (0, 0),
    "at the top": (0, 1),
    "at the top right": (0, 2),
    "at the left": (1, 0),
    "in the center": (1, 1),
    "at the right": (1, 2),
    "at the bottom left": (2, 0),
    "at the bottom": (2, 1),
    "at the bottom right": (2, 2),
}
"""Row and column of each place in a 3 x 3 grid."""

CENTRES = (27.0, 64.0, 101.0)
"""Middle in pixels of each row, and of each column, of places."""

_STRIPE_PERIOD = 32
_JITTER_PIXELS = 1.0
_STRETCH = 0.03


@dataclass(frozen=True, kw_only=True)
class Scene:
    """What one image shows; each field is a key of this module's tables."""

    colour: str
    shape: str
    place: str
    background: str
    size: str = "large"
    texture: str = "plain"

    def __post_init__(self) -> None:
        """Refuse names that no table knows, and a shape that would vanish into its background."""
        for field, known in _KNOWN.items():
            if getattr(self, field) not in known:
                raise ValueError(f"expected {field} to be one of {', '.join(known)}; got {getattr(self, field)!r}")
        if self.colour == self.background:
            raise ValueError(f"expected a colour unlike the background; got {self.colour!r} twice; change one of them")


_KNOWN: dict[str, Sequence[str]] = {
    "colour": tuple(PALETTE),
    "shape": SHAPES,
    "place": tuple(PLACES),
    "background": tuple(PALETTE),
    "size": tuple(SIZES),
    "texture": TEXTURES,
}


def stripe_tone(background: str) -> tuple[int, int, int]:
    """Colour of the second stripe: the background's mixed 3:1 with white (white itself: with mid grey)."""
    other = 128 if background == "white" else 255
    red, green, blue = (round(0.75 * channel + 0.25 * other) for channel in PALETTE[background])
    return red, green, blue


def scenes() -> Iterator[Scene]:
    """Every scene once, in a fixed order."""
    for colour, shape, place, background, size, texture in itertools.product(*_KNOWN.values()):
        if colour != background:
            yield Scene(colour=colour, shape=shape, place=place, background=background, size=size, texture=texture)


def is_held_out(scene: Scene) -> bool:
    """True for one in ten (colour, shape, place, background) combinations, chosen by a checksum of their names."""
    key = f"{scene.colour}/{scene.shape}/{scene.place}/{scene.background}"
    return zlib.crc32(key.encode()) % 10 == 0


def held_out_scenes(count: int, seed: int = 0) -> list[Scene]:
    """`count` distinct held-out scenes, drawn with `seed`."""
    pool = [scene for scene in scenes() if is_held_out(scene)]
    if not 0 < count <= len(pool):
        raise ValueError(f"expected a count from 1 to {len(pool)}, the number of held-out scenes; got {count}")
    chosen = np.random.default_rng(seed).choice(len(pool), size=count, replace=False)
    return [pool[index] for index in chosen]


def caption(scene: Scene) -> str:
    """The full caption of a scene: the first of `captions`."""
    return captions(scene)[0]


def captions(scene: Scene) -> tuple[str, ...]:
    """Every caption of a scene: "plain" and the size may go unsaid, and "center" be spelt "centre".

    The second half repeats the first with a capital letter in front.
    """
    texture = "striped " if scene.texture == "striped" else ""
    ground = f"{texture}{scene.background} background"
    place, british = scene.place, scene.place.replace("center", "centre")
    texts = (
        f"a {scene.size} {scene.colour} {scene.shape} {place} on a {ground}",
        f"a {scene.colour} {scene.shape} {british} on a {ground}",
        f"a {ground} with a {scene.size} {scene.colour} {scene.shape} {place}",
        f"{british}, a {scene.size} {scene.colour} {scene.shape} on a {ground}",
        f"{scene.size} {scene.colour} {scene.shape}, {place}, {scene.texture} {scene.background} background",
    )
    return texts + tuple(text[0].upper() + text[1:] for text in texts)


def render(scene: Scene, rng: np.random.Generator | None = None) -> np.ndarray:
    """Draw a scene as uint8 RGB of shape (SIDE, SIDE, 3).

    With `rng` the shape is moved by up to a pixel each way and its radius scaled by up to 3 percent, which is small
    beside the 8 pixels of an image token; without it the image is the nominal one.
    """
    row, column = PLACES[scene.place]
    shift_y, shift_x, stretch = (0.0, 0.0, 0.0) if rng is None else rng.uniform(-1.0, 1.0, 3)
    radius = SIZES[scene.size] * (1.0 + _STRETCH * stretch)
    pixels = np.arange(SIDE, dtype=np.float32) + 0.5
    y = pixels[:, None] - (CENTRES[row] + _JITTER_PIXELS * shift_y)
    x = pixels[None, :] - (CENTRES[column] + _JITTER_PIXELS * shift_x)
    coverage = np.clip(0.5 - outline_distance(scene.shape, x, y, radius), 0.0, 1.0)[..., None]
    picture = coverage * np.array(PALETTE[scene.colour]) + (1.0 - coverage) * _background(scene)
    return np.round(picture).astype(np.uint8)


def _background(scene: Scene) -> np.ndarray:
    """Background alone, float RGB of shape (SIDE, SIDE, 3): flat, or horizontal stripes half a period thick."""
    ground = np.broadcast_to(np.array(PALETTE[scene.background], dtype=np.float64), (SIDE, SIDE, 3)).copy()
    if scene.texture == "striped":
        odd = (np.arange(SIDE) // (_STRIPE_PERIOD // 2)) % 2 == 1
        ground[odd] = stripe_tone(scene.background)
    return ground


def outline_distance(shape: str, x: np.ndarray, y: np.ndarray, radius: float) -> np.ndarray:
    """Signed distance in pixels (negative inside) from (x, y), relative to the centre, to the shape's outline."""
    if shape == "circle":
        return np.hypot(x, y) - radius
    if shape == "ring":
        return np.abs(np.hypot(x, y) - 0.75 * radius) - 0.25 * radius
    if shape == "square":
        return np.maximum(np.abs(x), np.abs(y)) - 0.88 * radius
    if shape == "diamond":
        return (np.abs(x) + np.abs(y) - 1.1 * radius) / np.sqrt(2.0)
    if shape == "cross":
        arm, width = radius, 0.33 * radius
        bar = np.maximum(np.abs(x) - arm, np.abs(y) - width)
        post = np.maximum(np.abs(x) - width, np.abs(y) - arm)
        return np.minimum(bar, post)
    sides = (2.0 * np.abs(x) - y) / np.sqrt(5.0) - 0.45 * radius
    return np.maximum(sides, y - 0.9 * radius)


def to_tensor(drawn: np.ndarray) -> torch.Tensor:
    """Uint8 images (batch, side, side, 3) as float32 (batch, 3, side, side) in -1..1."""
    return torch.from_numpy(drawn).permute(0, 3, 1, 2).float().div(127.5).sub(1.0)


def pixels(batch: list[Scene], rng: np.random.Generator) -> torch.Tensor:
    """Jittered images of a batch of scenes, float32 (batch, 3, side, side) in -1..1."""
    return to_tensor(np.stack([render(scene, rng) for scene in batch]))
