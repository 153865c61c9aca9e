"""Captioned videos made by formula: one coloured shape swings smoothly along a line on a plain background.

    centre(t) = 24 + 5 sin(2 pi (start + t) / period)      along the line, in pixels

The shape slows down before it turns at the end of its line, so its course has no corner and never leaves the image,
however long the video is; and it never leaves the middle, where attention over time at one place finds it in every
frame. A caption may leave out the colour, the shape, or both: the video then shows any one of them, the same in all
its frames.
"""

import itertools
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from diffattn.tiny.shapes import PALETTE, outline_distance

SIDE = 48
"""Side of a frame in pixels."""

FRAMES = 16
"""Frames of a native clip."""

RADIUS = 14.0
"""Nominal radius of every shape in pixels."""

SWING = 5.0
"""Largest distance in pixels between the shape's centre and the middle of its line."""

LANE = (21.0, 27.0)
"""Range in pixels of the coordinate that a shape keeps: the row of a horizontal line, the column of a vertical one."""

PERIODS = (36, 40, 44, 48)
"""Frames from one side to the other and back; half of it is longer than a native clip."""

MOTIONS: dict[str, int] = {"sideways": 0, "up and down": 1}
"""Axis of each motion."""

SET_APART = 32
"""Combinations of colour, shape and background, of 80, whose captions judge the video transformer."""

MOVING_COLOURS = ("red", "yellow", "green", "blue", "white")
"""Those colours of `diffattn.tiny.shapes` between any two of which there is no third."""

MOVING_SHAPES = ("circle", "square", "triangle", "cross")
"""Those shapes of `diffattn.tiny.shapes` that are unlike when drawn on 12 x 12 latent cells."""


@dataclass(frozen=True, kw_only=True)
class MovingScene:
    """What one video shows; `motion` is a key of MOTIONS."""

    colour: str
    shape: str
    background: str
    motion: str = "sideways"

    def __post_init__(self) -> None:
        """Refuse names that no table knows, and a shape that would vanish into its background."""
        for field, known in _KNOWN.items():
            if getattr(self, field) not in known:
                raise ValueError(f"expected {field} to be one of {', '.join(known)}; got {getattr(self, field)!r}")
        if self.colour == self.background:
            raise ValueError(f"expected a colour unlike the background; got {self.colour!r} twice; change one of them")

    @property
    def axis(self) -> int:
        """0 for a horizontal line, 1 for a vertical one."""
        return MOTIONS[self.motion]


_KNOWN: dict[str, Sequence[str]] = {
    "colour": MOVING_COLOURS,
    "shape": MOVING_SHAPES,
    "background": MOVING_COLOURS,
    "motion": tuple(MOTIONS),
}


@dataclass(frozen=True, kw_only=True)
class Course:
    """Where a shape is at each time."""

    axis: int
    """0 for a horizontal line, 1 for a vertical one."""
    lane: float
    """The coordinate that stays, in pixels."""
    period: int
    start: float
    """Frames since the shape last passed the middle of its line towards the right, or downwards."""

    def centres(self, frames: int) -> np.ndarray:
        """Centre of the shape in each frame, float (frames, 2) of x and y in pixels."""
        phase = 2.0 * np.pi * (self.start + np.arange(frames)) / self.period
        places = np.full((frames, 2), self.lane)
        places[:, self.axis] = SIDE / 2 + SWING * np.sin(phase)
        return places


def scenes() -> Iterator[MovingScene]:
    """Every scene once, in a fixed order."""
    for colour, shape, background, motion in itertools.product(*_KNOWN.values()):
        if colour != background:
            yield MovingScene(colour=colour, shape=shape, background=background, motion=motion)


def is_held_out(scene: MovingScene) -> bool:
    """True for about one in ten (colour, shape, background) combinations, chosen by a checksum of their names."""
    return zlib.crc32(_name(scene).encode()) % 10 == 0


def held_out_scenes(count: int, seed: int = 0) -> list[MovingScene]:
    """`count` distinct held-out scenes, drawn with `seed`."""
    pool = [scene for scene in scenes() if is_held_out(scene)]
    if not 0 < count <= len(pool):
        raise ValueError(f"expected a count from 1 to {len(pool)}, the number of held-out scenes; got {count}")
    chosen = np.random.default_rng(seed).choice(len(pool), size=count, replace=False)
    return [pool[index] for index in chosen]


def set_apart_scenes() -> list[MovingScene]:
    """The 64 scenes of the SET_APART (colour, shape, background) combinations with the smallest checksums."""
    combinations = sorted({_name(scene) for scene in scenes()}, key=lambda name: zlib.crc32(name.encode()))
    chosen = set(combinations[:SET_APART])
    return [scene for scene in scenes() if _name(scene) in chosen]


def is_set_apart(scene: MovingScene) -> bool:
    """True for the scenes that the transformer's training never saw: two combinations in five."""
    return scene in set_apart_scenes()


def _name(scene: MovingScene) -> str:
    return f"{scene.colour}/{scene.shape}/{scene.background}"


def caption(scene: MovingScene, *, colour: bool = True, shape: bool = True, motion: bool = True) -> str:
    """Say a scene in words; what is False goes unsaid: "a shape moving on a blue background"."""
    words = ["a", scene.colour if colour else "", scene.shape if shape else "shape", "moving"]
    words += [scene.motion if motion else "", f"on a {scene.background} background"]
    return " ".join(word for word in words if word)


def draw_course(scene: MovingScene, rng: np.random.Generator) -> Course:
    """A random course of the scene."""
    period = int(rng.choice(PERIODS))
    return Course(axis=scene.axis, lane=rng.uniform(*LANE), period=period, start=rng.uniform(0, period))


def render(scene: MovingScene, course: Course, frames: int = FRAMES) -> np.ndarray:
    """Draw the scene's shape along `course`, uint8 RGB of shape (frames, SIDE, SIDE, 3)."""
    pixels = np.arange(SIDE, dtype=np.float32) + 0.5
    centres = course.centres(frames).astype(np.float32)
    x = pixels[None, None, :] - centres[:, 0, None, None]
    y = pixels[None, :, None] - centres[:, 1, None, None]
    coverage = np.clip(0.5 - outline_distance(scene.shape, x, y, RADIUS), 0.0, 1.0)[..., None]
    figure, ground = np.array(PALETTE[scene.colour]), np.array(PALETTE[scene.background])
    return np.round(coverage * figure + (1.0 - coverage) * ground).astype(np.uint8)


def render_random(scene: MovingScene, seed: int, frames: int = FRAMES) -> np.ndarray:
    """Draw the scene along the random course of `seed`, uint8 RGB of shape (frames, SIDE, SIDE, 3)."""
    return render(scene, draw_course(scene, np.random.default_rng(seed)), frames)
