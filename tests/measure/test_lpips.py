"""LPIPS by given weights: against the formula written out, and what is refused."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F

from diffattn.measure.lpips import CONVOLUTIONS, Lpips


def weights(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for layer, (number, inside, out, kernel, _, _) in enumerate(CONVOLUTIONS):
        scale = (inside * kernel**2) ** -0.5
        found[f"features.{number}.weight"] = scale * torch.randn(out, inside, kernel, kernel, generator=generator)
        found[f"features.{number}.bias"] = 0.1 * torch.randn(out, generator=generator)
        found[f"lin{layer}.model.1.weight"] = torch.rand(1, out, 1, 1, generator=generator)
    return found


def written_out(a: np.ndarray, b: np.ndarray, held: dict[str, torch.Tensor]) -> float:
    def features(image: np.ndarray) -> list[torch.Tensor]:
        x = torch.from_numpy(image.transpose(2, 0, 1)[None]).float() * 2 - 1
        x = (x - torch.tensor([-0.030, -0.088, -0.188])[:, None, None]) / torch.tensor([0.458, 0.448, 0.450])[
            :, None, None
        ]
        found = [F.relu(F.conv2d(x, held["features.0.weight"], held["features.0.bias"], stride=4, padding=2))]
        pooled = F.max_pool2d(found[-1], 3, 2)
        found.append(F.relu(F.conv2d(pooled, held["features.3.weight"], held["features.3.bias"], padding=2)))
        x = F.max_pool2d(found[-1], 3, 2)
        for number in (6, 8, 10):
            x = F.relu(F.conv2d(x, held[f"features.{number}.weight"], held[f"features.{number}.bias"], padding=1))
            found.append(x)
        return [x / (x.norm(dim=1, keepdim=True) + 1e-10) for x in found]

    total = 0.0
    for layer, (x, y) in enumerate(zip(features(a), features(b), strict=True)):
        total += float((held[f"lin{layer}.model.1.weight"] * (x - y) ** 2).sum(1).mean())
    return total


def test_it_is_the_formula(tmp_path: Path) -> None:
    held = weights()
    save_file(held, tmp_path / "a.safetensors")
    distance = Lpips.load(tmp_path / "a.safetensors")
    a, b = np.random.default_rng(0).random((2, 70, 96, 3))
    assert distance(a, b) == pytest.approx(written_out(a, b, held), rel=1e-4)
    assert distance(a, a) == 0 and distance(a, (a + b) / 2) < distance(a, b)


def test_missing_and_misshapen_tensors_are_named(tmp_path: Path) -> None:
    held = weights()
    del held["features.6.bias"]
    held["lin2.model.1.weight"] = torch.zeros(1, 5, 1, 1)
    save_file(held, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"missing \['features.6.bias'\], of another size \['lin2.model.1.weight'\]"):
        Lpips.load(tmp_path / "a.safetensors")
    (tmp_path / "b.safetensors").write_text("x")
    with pytest.raises(ValueError, match=r"cannot read LPIPS weights from .*b\.safetensors"):
        Lpips.load(tmp_path / "b.safetensors")
