"""LPIPS of two images, by weights that the user gives.

    d(a, b) = sum over the layers l of mean over the places p of w_l . (f_l(a)_p - f_l(b)_p)^2

f_l: features of AlexNet after its five ReLUs, each scaled to length 1 over the channels; w_l >= 0: learned.

Source: Zhang et al., The Unreasonable Effectiveness of Deep Features as a Perceptual Metric,
https://arxiv.org/abs/1801.03924; the network is that of Krizhevsky, https://arxiv.org/abs/1404.5997.
"""

import os
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ..media.pixels import as_pixels

MEAN, SPREAD = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
"""Of the channels of images in -1 to 1."""
CONVOLUTIONS = (
    (0, 3, 64, 11, 4, 2),
    (3, 64, 192, 5, 1, 2),
    (6, 192, 384, 3, 1, 1),
    (8, 384, 256, 3, 1, 1),
    (10, 256, 256, 3, 1, 1),
)
"""Number in `features`, channels in and out, kernel, stride, padding."""
POOLED_BEFORE = (1, 2)
"""Convolutions that a pooling of 3 x 3, every second place, goes before."""


class Lpips(nn.Module):
    """The distance; call it with two images `(height, width, 3)` in 0-1."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.ModuleDict(
            {str(number): nn.Conv2d(*sizes) for number, *sizes in CONVOLUTIONS}  # type: ignore[arg-type]
        )
        self.weights = nn.ParameterList([nn.Parameter(torch.zeros(out)) for _, _, out, *_ in CONVOLUTIONS])

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Lpips":
        """From one .safetensors file: `features.N.weight` and `.bias` of AlexNet, `lin0.model.1.weight` to `lin4...`.

        Raises `ValueError` that names every missing tensor.
        """
        try:
            held = load_file(path)
        except Exception as error:  # safetensors has errors of its own
            raise ValueError(f"cannot read LPIPS weights from {path}: {error}") from error
        made = cls()
        wanted = {f"features.{n}.{part}": getattr(conv, part) for n, conv in made.features.items() for part in PARTS}
        wanted |= {f"lin{number}.model.1.weight": weight for number, weight in enumerate(made.weights)}
        missing = sorted(wanted.keys() - held.keys())
        wrong = [name for name in wanted.keys() & held.keys() if held[name].numel() != wanted[name].numel()]
        if missing or wrong:
            raise ValueError(f"{path} is no LPIPS by AlexNet: missing {missing}, of another size {sorted(wrong)}")
        with torch.no_grad():
            for name, parameter in wanted.items():
                parameter.copy_(held[name].reshape(parameter.shape))
        return made

    def layers(self, image: Any) -> list[Tensor]:
        """Features after each ReLU, of length 1 over the channels."""
        x = 2 * torch.from_numpy(as_pixels(image)).float().permute(2, 0, 1)[None] - 1
        x = (x - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(SPREAD).view(3, 1, 1)
        found = []
        for number, conv in enumerate(self.features.values()):
            if number in POOLED_BEFORE:
                x = nn.functional.max_pool2d(x, 3, 2)
            x = conv(x).relu()
            found.append(x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10))
        return found

    @torch.no_grad()
    def forward(self, a: Any, b: Any) -> float:
        """Their distance: 0 where they are equal."""
        pairs = zip(self.weights, self.layers(a), self.layers(b), strict=True)
        return float(sum((weight.view(-1, 1, 1) * (x - y).square()).sum(1).mean() for weight, x, y in pairs))


PARTS = "weight", "bias"
