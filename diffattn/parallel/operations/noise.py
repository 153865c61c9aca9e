"""Noise that depends on seed, frame and step alone, not on who draws it.

    z = sqrt(-2 ln u_1) cos(2 pi u_2), sqrt(-2 ln u_1) sin(2 pi u_2),    u = Philox4x32-10(key = seed, counter)
    counter = (block within the frame, 0, frame, step)

Philox is a bijection of the 128-bit counter for every 64-bit key. Two frames, two steps or two seeds never share a
stream, as seeds of a usual generator do when they are added up (seed + rank) or hashed into its 32 bits.
Drawn on the CPU in float32 and then cast and moved, so all dtypes and devices see the same noise.

Cost: about 150 integer operations for each 4 numbers.
Source: Salmon, Moraes, Dror, Shaw, Parallel random numbers: as easy as 1, 2, 3, 2011,
https://doi.org/10.1145/2063384.2063405; Box and Muller, 1958.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


@dataclass(frozen=True)
class FrameNoise:
    """Unit normal noise for the frames of a video.

    >>> noise = FrameNoise(seed=7)
    >>> whole = noise.draw(range(6), (4, 8, 8))
    >>> torch.equal(noise.draw([5, 2], (4, 8, 8)), whole[[5, 2]])
    True
    """

    seed: int

    def __post_init__(self) -> None:
        if not isinstance(self.seed, int) or isinstance(self.seed, bool) or not 0 <= self.seed < 2**64:
            raise ValueError(f"seed must be an int from 0 to 2**64 - 1, got {self.seed!r}")

    def draw(
        self,
        frames: Sequence[int],
        shape: Sequence[int],
        *,
        step: int = 0,
        dim: int = 0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> Tensor:
        """Noise of `frames`, each of `shape`, along a new axis `dim`.

        Latents `(b, c, f, h, w)` of a clip: `draw(plan.own, (b, c, h, w), dim=2)`. A sample's noise does not depend on
        how many follow it in the batch.

        Args:
            frames: numbers in the whole video.
            step: 0 for the initial noise, i + 1 for what a scheduler adds in step i.

        Raises `ValueError` for numbers below 0 or beyond 32 bits.
        """
        for name, values in (("step", [step]), ("frames", frames)):
            if any(not 0 <= value <= _WORD for value in values):
                raise ValueError(f"{name} must be numbers from 0 to 2**32 - 1, got {list(values)}")
        size = math.prod(shape)
        blocks = -(-size // 4)
        counter = torch.zeros(4, len(frames), blocks, dtype=torch.int64)
        counter[0] = torch.arange(blocks)
        counter[2] = torch.tensor(list(frames), dtype=torch.int64)[:, None]
        counter[3] = step
        words = torch.stack(philox(counter.unbind(0), (self.seed & _WORD, self.seed >> 32)), dim=-1)
        normal = _normal(words.flatten(1))[:, :size].reshape(len(frames), *shape)
        return normal.movedim(0, dim).contiguous().to(device, dtype)


def philox(counter: Sequence[Tensor], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Philox4x32-10: four int64 tensors of 32-bit words in, four out."""
    a, b, c, d = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        (high0, low0), (high1, low1) = _product(a, _MULTIPLIERS[0]), _product(c, _MULTIPLIERS[1])
        a, b, c, d = high1 ^ b ^ k0, low1, high0 ^ d ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _WORD, (k1 + _WEYL[1]) & _WORD
    return a, b, c, d


def _product(x: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """High and low word of a product of words; by halves, for 64 signed bits do not hold it."""
    low, high = x * (factor & 0xFFFF), x * (factor >> 16)
    total = low + ((high & 0xFFFF) << 16)
    return (high >> 16) + (total >> 32), total & _WORD


def _normal(words: Tensor) -> Tensor:
    """Unit normal float32 numbers from pairs of 32-bit words, by Box and Muller; worked out in float64."""
    first, second = ((words.double() + 0.5) / 2.0**32).unflatten(-1, (-1, 2)).unbind(-1)
    radius, angle = (-2 * first.log()).sqrt(), 2 * math.pi * second
    return torch.stack([radius * angle.cos(), radius * angle.sin()], dim=-1).flatten(-2).float()
