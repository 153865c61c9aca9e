"""What the trainer is fed: samples by number, each drawn from its own random numbers.

Every step takes the samples at `batch_size` consecutive places of an endless order, one seeded permutation after the
other. A sample's noise depends on the seed and its place alone, so a run is the same however its batches are split:
over processes, over accumulated parts, or after a resume. With a number of noises it depends on the sample and on how
often it came, and recurs.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sample:
    """One training sample as the model takes it."""

    name: str
    """What an error message calls it."""
    latents: Tensor
    """(channels, height, width), or (channels, frames, height, width); shifted and scaled, float32."""
    conditioning: dict[str, Tensor]
    """Arguments of the model's forward that say what is in the image, without the batch axis."""


class Source(Protocol):
    """Samples by number."""

    def __len__(self) -> int: ...

    def sample(self, index: int, generator: torch.Generator) -> Sample:
        """Sample `index`; what is random in it (the VAE's posterior, the caption) comes from `generator`.

        Raises `ValueError` with its name where it can't be read.
        """
        ...


@dataclass(frozen=True)
class Batch:
    """Some samples, with the random numbers that noise them."""

    latents: Tensor
    """(b, ...)"""
    conditioning: dict[str, Tensor]
    noise: Tensor
    """Standard normal, as `latents`."""
    uniform: Tensor
    """(b,) in [0, 1): chooses the noise level."""
    numbers: tuple[int, ...] = ()
    """Of sample and noise together, each below samples x noises; () where no noise recurs."""

    def to(self, device: torch.device | str) -> "Batch":
        moved = {name: value.to(device) for name, value in self.conditioning.items()}
        return replace(
            self,
            latents=self.latents.to(device),
            conditioning=moved,
            noise=self.noise.to(device),
            uniform=self.uniform.to(device),
        )


def index_at(place: int, count: int, seed: int) -> int:
    """Which of `count` samples lies at `place` of the endless order."""
    epoch, within = divmod(place, count)
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return int(torch.randperm(count, generator=generator)[within])


def places(step: int, batch_size: int, part: int, parts: int) -> range:
    """The places of `part` among `parts` equal parts of the batch at `step`."""
    if batch_size % parts:
        raise ValueError(
            f"a batch of {batch_size} does not split into {parts} equal parts (processes x accumulation steps); "
            f"choose a multiple of {parts}"
        )
    size = batch_size // parts
    first = step * batch_size + part * size
    return range(first, first + size)


def collate(source: Source, chosen: Sequence[int], seed: int, noises: int = 0) -> Batch:
    """The batch at some places; its samples must be of one size. `noises` of a sample recur, 0: none does."""
    samples, noise, uniform, numbers = [], [], [], []
    for place in chosen:
        index = index_at(place, len(source), seed)
        if noises:
            numbers.append(index + len(source) * (place // len(source) % noises))
        number = numbers[-1] if noises else place
        generator = torch.Generator().manual_seed(seed * 1_000_003 + 500_009 * number + 1)
        samples.append(source.sample(index, generator))
        noise.append(torch.randn(samples[-1].latents.shape, generator=generator))
        uniform.append(torch.rand((), generator=generator))
    shapes = {tuple(sample.latents.shape): sample.name for sample in samples}
    if len(shapes) > 1:
        found = ", ".join(f"{name} is {list(shape)}" for shape, name in shapes.items())
        raise ValueError(f"latents of one batch must be of one size, got {found}; sort the images by size")
    names = samples[0].conditioning
    conditioning = {name: torch.stack([sample.conditioning[name] for sample in samples]) for name in names}
    return Batch(
        torch.stack([sample.latents for sample in samples]),
        conditioning,
        torch.stack(noise),
        torch.stack(uniform),
        tuple(numbers),
    )
