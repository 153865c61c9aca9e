"""Colours of one image given to another."""

from itertools import product

import pytest
import torch
from torch import Tensor

from diffattn.media.color import _resized as resized
from diffattn.media.color import adain_fix, blur, keep_luma, to_bytes, wavelet_fix, wavelet_split

SIZES = [(1, 1), (1, 7), (9, 1), (5, 4), (23, 38)]


def pictures(rows: int, columns: int, seed: int = 0, batch: int = 2) -> Tensor:
    return torch.rand(batch, 3, rows, columns, generator=torch.Generator().manual_seed(seed))


def blur_by_hand(x: Tensor, dilation: int) -> Tensor:
    """The nine taps one by one, with places beyond the edge clamped to it."""
    rows, columns = x.shape[-2:]
    out = torch.zeros_like(x, dtype=torch.float64)
    for (y, dy), (z, dz) in product([(1, -1), (2, 0), (1, 1)], repeat=2):
        row = (torch.arange(rows) + dy * dilation).clamp(0, rows - 1)
        column = (torch.arange(columns) + dz * dilation).clamp(0, columns - 1)
        out += y * z / 16 * x[..., row, :][..., column].double()
    return out.to(x.dtype)


@pytest.mark.parametrize("dilation", [1, 2, 16])
@pytest.mark.parametrize(("rows", "columns"), SIZES)
def test_a_blur_is_nine_taps_with_repeated_edges(rows: int, columns: int, dilation: int) -> None:
    x = pictures(rows, columns)
    torch.testing.assert_close(blur(x, dilation), blur_by_hand(x, dilation))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_half_precision_is_a_rounding_of_the_blur(dtype: torch.dtype) -> None:
    x = pictures(6, 5).to(dtype)
    assert torch.equal(blur(x, 2), blur(x.to(torch.promote_types(dtype, torch.float32)), 2).to(dtype))


@pytest.mark.parametrize("dilation", [0, -1])
def test_a_blur_without_width_is_refused(dilation: int) -> None:
    with pytest.raises(ValueError, match=f"dilation of at least 1 pixel; got {dilation}"):
        blur(pictures(4, 4), dilation)


@pytest.mark.parametrize(("rows", "columns"), SIZES)
def test_the_bands_sum_to_the_picture_and_the_low_one_holds_constants(rows: int, columns: int) -> None:
    x = pictures(rows, columns)
    high, low = wavelet_split(x)
    torch.testing.assert_close(high + low, x)
    torch.testing.assert_close(low, blur(blur(blur(blur(blur(x, 1), 2), 4), 8), 16))
    torch.testing.assert_close(wavelet_split(torch.full_like(x, 0.3))[1], torch.full_like(x, 0.3))


@pytest.mark.parametrize("levels", [1, 5])
@pytest.mark.parametrize(("rows", "columns"), SIZES)
def test_the_wavelet_fix_joins_the_high_band_and_the_low_one(rows: int, columns: int, levels: int) -> None:
    content, style = pictures(rows, columns), pictures(rows, columns, seed=1)
    kept = content.clone(), style.clone()
    got = wavelet_fix(content, style, levels)
    want = wavelet_split(content, levels)[0] + wavelet_split(style, levels)[1]
    torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-5)
    assert torch.equal(content, kept[0]) and torch.equal(style, kept[1])


def test_the_wavelet_fix_takes_a_tint_back_and_leaves_detail() -> None:
    style = pictures(40, 24) * 0.5
    tinted = style + torch.tensor([0.2, 0.0, -0.1])[:, None, None]
    torch.testing.assert_close(wavelet_fix(tinted, style), style, atol=1e-6, rtol=0)


def test_the_wavelet_fix_wants_one_size() -> None:
    with pytest.raises(ValueError, match="content and style of one shape.*resize the style"):
        wavelet_fix(pictures(4, 5), pictures(5, 4))


def test_adain_gives_mean_and_deviation_of_a_style_of_another_size() -> None:
    content, style = pictures(11, 6), pictures(4, 9, seed=1) * 0.4 + 0.1
    got = adain_fix(content, style, eps=0.0)
    torch.testing.assert_close(got.mean((-2, -1)), style.mean((-2, -1)))
    torch.testing.assert_close(got.std((-2, -1), correction=1), style.std((-2, -1), correction=1))
    correlation = torch.corrcoef(torch.stack([got[1, 2].flatten(), content[1, 2].flatten()]))[0, 1]
    assert float(correlation) == pytest.approx(1)


def test_adain_does_not_blow_flat_pictures_up() -> None:
    flat, style = torch.full((1, 3, 5, 7), 0.25), pictures(5, 7, batch=1)
    torch.testing.assert_close(adain_fix(flat, style), style.mean((-2, -1), keepdim=True).expand_as(flat))


def test_adain_of_one_pixel_is_the_mean_of_the_style() -> None:
    pixel, style = pictures(1, 1), pictures(3, 4, seed=1)
    torch.testing.assert_close(adain_fix(pixel, style), style.mean((-2, -1), keepdim=True))
    torch.testing.assert_close(adain_fix(style, pixel).mean((-2, -1)), pixel[..., 0, 0])


def test_adain_pairs_pictures_with_styles() -> None:
    with pytest.raises(ValueError, match="got 1 for 2"):
        adain_fix(pictures(4, 4), pictures(4, 4, batch=1))


def luma(x: Tensor) -> Tensor:
    return 0.299 * x[:, 0] + 0.587 * x[:, 1] + 0.114 * x[:, 2]


def test_luma_is_the_gray_ones_and_chroma_the_coloured_ones() -> None:
    gray = (pictures(5, 8)[:, :1] * 0.2 + 0.4).expand(-1, 3, -1, -1)
    coloured = pictures(5, 8, seed=1) * 0.2 + 0.4
    got = keep_luma(gray, coloured)
    step = 1 / 255
    torch.testing.assert_close(luma(got), luma(gray), atol=1.5 * step, rtol=0)
    for channel in (0, 2):
        want = coloured[:, channel] - luma(coloured)
        torch.testing.assert_close(got[:, channel] - luma(got), want, atol=2.5 * step, rtol=0)


def test_gray_on_gray_stays_byte_by_byte() -> None:
    gray = (torch.arange(256.0) / 255).reshape(1, 1, 8, 32).expand(1, 3, -1, -1)
    got = keep_luma(gray, torch.full((1, 3, 3, 3), 0.6))
    assert torch.equal(to_bytes(got, truncate=False), to_bytes(gray, truncate=False))


KNOWN = [
    ((255, 0, 0), (128, 128, 128), (255, 69, 53)),
    ((0, 0, 255), (128, 128, 128), (99, 99, 255)),
    ((10, 200, 30), (60, 60, 60), (0, 136, 0)),
]
"""Coloured, gray, and what comes of them, worked out by hand; the first has a V that is cut off."""


@pytest.mark.parametrize(("coloured", "gray", "want"), KNOWN)
def test_known_pixels(coloured: tuple[int, ...], gray: tuple[int, ...], want: tuple[int, ...]) -> None:
    got = keep_luma(*(torch.tensor(pixel).reshape(1, 3, 1, 1) / 255 for pixel in (gray, coloured)))
    assert to_bytes(got, truncate=False).flatten().tolist() == list(want)


def test_the_coloured_picture_is_resized_bilinearly() -> None:
    gray = torch.full((1, 3, 1, 4), 0.5)
    coloured = torch.tensor([[0.5, 0.7], [0.5, 0.5], [0.5, 0.3]]).reshape(1, 3, 1, 2)
    red = keep_luma(gray, coloured)[0, 0, 0]
    assert float(red[1] - red[0]) == pytest.approx(float(red[3] - red[2]), abs=0.009)
    assert float(red[2] - red[1]) == pytest.approx(2 * float(red[1] - red[0]), abs=0.009)


@pytest.mark.parametrize("size", [(50, 61), (13, 9), (40, 24), (20, 48), (1, 1)])
def test_the_resizing_is_bilinear_within_a_level(size: tuple[int, int]) -> None:
    coloured = to_bytes(pictures(40, 48), truncate=False)
    want = torch.nn.functional.interpolate(coloured.double(), size=size, mode="bilinear")
    got = resized(coloured.int(), *size)
    assert got.dtype == torch.int32 and float((got - want).abs().max()) <= 1
    flat = torch.full((1, 3, 7, 5), 201, dtype=torch.int32)
    assert torch.equal(resized(flat, *size), flat[:, :, :1, :1].expand(-1, -1, *size))


def test_bytes_are_clamped_and_cut_off_or_rounded() -> None:
    x = torch.tensor([-0.2, 0.0, 0.999, 1.3, 10.9 / 255])
    kept = x.clone()
    assert to_bytes(x).tolist() == [0, 0, 254, 255, 10]
    assert to_bytes(x, truncate=False).tolist() == [0, 0, 255, 255, 11]
    assert torch.equal(x, kept)


@pytest.mark.parametrize("truncate", [False, True])
def test_every_byte_survives_the_way_there_and_back(truncate: bool) -> None:
    values = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_bytes(values / 255, truncate), values)


def test_bytes_of_bytes_are_refused() -> None:
    with pytest.raises(TypeError, match="got torch.uint8; divide bytes by 255"):
        to_bytes(torch.zeros(2, dtype=torch.uint8))


@pytest.mark.parametrize("fix", [wavelet_fix, adain_fix, keep_luma])
@pytest.mark.parametrize("wrong", [torch.zeros(3, 4, 4), torch.zeros(1, 4, 4, 4), torch.zeros(1, 3, 4, 4).byte()])
def test_what_is_no_batch_of_rgb_floats_is_refused(fix, wrong: Tensor) -> None:
    with pytest.raises(ValueError, match=r"expected floating point images \(batch, 3, rows, columns\)"):
        fix(wrong, wrong)
