"""Losses of the condition encoder, against numpy loops."""

import numpy as np
import pytest
import torch
from diffattn.pipelines.pixel_aware_sr.training.losses import COLOURFULNESS_WEIGHT, colourfulness_loss, pyramid_loss
from torch import Tensor

SIZES = ((9, 15), (5, 8), (3, 4))
"""Of the predictions of a target of 17 x 30: halved by convolutions of stride 2, rounded up."""


def pictures(*size: int, batch: int = 2) -> Tensor:
    return 2 * torch.rand(batch, 3, *size, dtype=torch.float64) - 1


def slow_resized(picture: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """One channel, by the four neighbours of every new pixel's middle."""
    out = np.zeros((rows, columns))
    for row in range(rows):
        for column in range(columns):
            y = max(0.0, (row + 0.5) * picture.shape[0] / rows - 0.5)
            x = max(0.0, (column + 0.5) * picture.shape[1] / columns - 0.5)
            top, left = int(y), int(x)
            bottom, right = min(top + 1, picture.shape[0] - 1), min(left + 1, picture.shape[1] - 1)
            down, along = y - top, x - left
            upper = (1 - along) * picture[top, left] + along * picture[top, right]
            lower = (1 - along) * picture[bottom, left] + along * picture[bottom, right]
            out[row, column] = (1 - down) * upper + down * lower
    return out


def slow_pyramid(rgbs: list[np.ndarray], target: np.ndarray) -> float:
    total = 0.0
    for rgb in rgbs:
        differences = [
            np.abs(rgb[item, channel] - slow_resized(target[item, channel], *rgb.shape[-2:]))
            for item in range(len(rgb))
            for channel in range(3)
        ]
        total += float(np.mean(differences))
    return total


def slow_colourfulness(batch: np.ndarray) -> float:
    total = 0.0
    for red, green, blue in batch:
        count = red.size
        rg = [abs(r - g) for r, g in zip(red.ravel(), green.ravel(), strict=True)]
        yb = [abs((r + g) / 2 - b) for r, g, b in zip(red.ravel(), green.ravel(), blue.ravel(), strict=True)]
        means = [sum(rg) / count, sum(yb) / count]
        squares = [sum((v - mean) ** 2 for v in values) for values, mean in zip((rg, yb), means, strict=True)]
        spread = (sum(squares) / (count - 1)) ** 0.5
        total += 1 - (spread + 0.3 * (means[0] ** 2 + means[1] ** 2) ** 0.5)
    return total


def test_the_pyramid_is_the_sum_of_three_mean_differences() -> None:
    target, rgbs = pictures(17, 30), [pictures(*size) for size in SIZES]
    want = slow_pyramid([rgb.numpy() for rgb in rgbs], target.numpy())
    assert pyramid_loss(rgbs, target).item() == pytest.approx(want, rel=1e-12)


def test_the_pyramid_is_zero_for_the_resized_target_alone() -> None:
    target = pictures(16, 24)
    rgbs = [torch.from_numpy(np.stack([[slow_resized(c, 8, 12) for c in one] for one in target.numpy()]))]
    assert pyramid_loss(rgbs, target).item() < 1e-12
    assert pyramid_loss([rgbs[0] + 0.25], target).item() == pytest.approx(0.25)
    assert pyramid_loss([rgbs[0].flip(0)], target).item() > 0.1, "images of a batch are not exchanged"


def test_the_pyramid_pulls_every_prediction_and_not_the_target() -> None:
    target = pictures(16, 24)
    rgbs = [torch.zeros(2, 3, *size, dtype=torch.float64, requires_grad=True) for size in ((8, 12), (4, 6), (2, 3))]
    pyramid_loss(rgbs, target).backward()
    for rgb in rgbs:
        assert rgb.grad is not None
        np.testing.assert_allclose(rgb.grad.abs().numpy(), 1 / rgb.numel(), rtol=1e-12)


def test_half_precision_is_resized_and_averaged_in_single() -> None:
    target, rgb = pictures(17, 30).half(), pictures(9, 15).half().requires_grad_()
    loss = pyramid_loss([rgb], target)
    loss.backward()
    assert loss.dtype == torch.float32
    want = slow_pyramid([rgb.detach().double().numpy()], target.double().numpy())
    assert loss.item() == pytest.approx(want, rel=1e-6)
    assert rgb.grad is not None
    assert rgb.grad.dtype == torch.float16
    assert rgb.grad.abs().min() > 0


def test_one_pixel_is_a_scale_too() -> None:
    target = pictures(1, 1)
    assert pyramid_loss([torch.zeros_like(target)], target).item() == pytest.approx(target.abs().mean().item())


@pytest.mark.parametrize("size", [(7, 5), (1, 2), (3, 1)])
def test_colourfulness_is_its_formula(size: tuple[int, int]) -> None:
    batch = pictures(*size, batch=3)
    # The floor under the roots moves each of the two per image by less than its own root.
    assert colourfulness_loss(batch).item() == pytest.approx(slow_colourfulness(batch.numpy()), abs=1e-6)


def test_colourful_pictures_lose_less() -> None:
    gray = torch.linspace(-1, 1, 35, dtype=torch.float64).view(1, 1, 5, 7).expand(1, 3, 5, 7)
    colour = pictures(5, 7, batch=1)
    assert colourfulness_loss(gray).item() == pytest.approx(1, abs=1e-3)
    assert colourfulness_loss(colour).item() < colourfulness_loss(0.3 * colour).item() < 1


def test_a_batch_is_a_sum() -> None:
    batch = pictures(4, 6, batch=3)
    want = sum(colourfulness_loss(batch[number : number + 1]).item() for number in range(3))
    assert colourfulness_loss(batch).item() == pytest.approx(want)


def test_gray_pictures_have_finite_gradients() -> None:
    for dtype in (torch.float32, torch.float16):
        gray = torch.zeros(2, 3, 4, 6, dtype=dtype, requires_grad=True)
        loss = colourfulness_loss(gray)
        loss.backward()
        assert loss.dtype == torch.float32
        assert gray.grad is not None
        assert gray.grad.isfinite().all()


def test_a_little_colour_is_pulled_to_more() -> None:
    picture = (0.01 * pictures(4, 6)).requires_grad_()
    before = colourfulness_loss(picture)
    (step,) = torch.autograd.grad(before, picture)
    assert colourfulness_loss(picture - 0.01 * step).item() < before.item()


def test_the_weight_is_what_the_released_loop_comes_to() -> None:
    rgbs, total = [pictures(*size) for size in SIZES], 0.0
    for _ in rgbs:
        total += 0.001 * sum(slow_colourfulness(rgb.numpy()) for rgb in rgbs)
    got = COLOURFULNESS_WEIGHT * sum(colourfulness_loss(rgb).item() for rgb in rgbs)
    assert got == pytest.approx(total, abs=1e-8)


def test_wrong_shapes_are_refused() -> None:
    target = pictures(8, 8)
    for rgbs, message in (
        ([], "expected at least one prediction; got none"),
        ([pictures(4, 4), pictures(2, 2, batch=1)], r"expected rgbs\[1\] of the target's batch 2; got 1"),
        ([torch.zeros(2, 1, 4, 4)], r"expected rgbs\[0\] as floats of shape"),
        ([torch.zeros(3, 4, 4)], "add a batch axis"),
        ([torch.zeros(2, 3, 4, 4, dtype=torch.uint8)], "got torch.uint8"),
        ([torch.zeros(2, 3, 0, 4)], r"\(2, 3, 0, 4\)"),
    ):
        with pytest.raises(ValueError, match=message):
            pyramid_loss(rgbs, target)
    with pytest.raises(ValueError, match="expected target"):
        pyramid_loss([pictures(4, 4)], target[0])
    with pytest.raises(ValueError, match="expected pictures as floats"):
        colourfulness_loss(torch.zeros(2, 4, 5, 5))
    with pytest.raises(ValueError, match="two pixels or more; got 1 x 1"):
        colourfulness_loss(pictures(1, 1))
