import pytest
import torch
from diffattn.pipelines.video_sr.i2vgenxl.padding import Padding, official_padding, official_target, pad, tight_padding

SIZES = [(1, 1), (1, 65), (7, 300), (240, 426), (720, 1280), (721, 1281), (960, 1704)]


def frames_of(height: int, width: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_tight_padding_is_the_least_that_the_network_takes(height: int, width: int) -> None:
    padding = tight_padding(height, width)
    rows, columns = height + padding.top + padding.bottom, width + padding.left + padding.right
    assert rows % 64 == 16 and columns % 64 == 0
    assert rows - height < 64 and columns - width < 64
    assert padding.bottom - padding.top in (0, 1) and padding.right - padding.left in (0, 1)


def test_legal_sizes_are_not_padded() -> None:
    assert tight_padding(720, 1280) == Padding(0, 0, 0, 0)
    assert tight_padding(16, 64) == Padding(0, 0, 0, 0)


def test_networks_with_fewer_downsamplings_need_less() -> None:
    padding = tight_padding(40, 30, downsamplings=1)
    assert (40 + padding.top + padding.bottom, 30 + padding.left + padding.right) == (48, 32)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (2, 5), (3, 1), (40, 90)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.uint8])
def test_crop_undoes_pad(height: int, width: int, dtype: torch.dtype) -> None:
    frames, padding = frames_of(height, width, dtype), tight_padding(height, width)
    padded = pad(frames, padding)
    assert padded.dtype == dtype and padded.shape[-2] % 64 == 16 and padded.shape[-1] % 64 == 0
    assert torch.equal(padding.crop(padded), frames)


def test_edges_are_reflected() -> None:
    frames = frames_of(9, 12)
    padding = Padding(left=3, right=11, top=8, bottom=2)
    want = torch.nn.functional.pad(frames, (3, 11, 8, 2), mode="reflect")
    assert torch.equal(pad(frames, padding), want)


def test_short_sides_are_reflected_to_and_fro() -> None:
    row = torch.tensor([[[[0.0, 1.0, 2.0]]]])
    padded = pad(row, Padding(left=4, right=5, top=1, bottom=1))
    assert padded[0, 0].tolist() == [[0, 1, 2, 1, 0, 1, 2, 1, 0, 1, 2, 1]] * 3


def test_official_padding_is_white() -> None:
    frames = frames_of(5, 4) * 2 - 1
    padded = pad(frames, Padding(left=1, right=2, top=0, bottom=3), official=True)
    assert padded.shape == (2, 3, 8, 7)
    assert bool((padded[..., 5:, :] == 1).all()) and bool((padded[..., 0] == 1).all())
    assert torch.equal(padded[..., :5, 1:5], frames)


def test_official_padding_lies_around_small_frames_and_behind_large_ones() -> None:
    assert official_padding(719, 101) == Padding(left=589, right=590, top=0, bottom=1)
    assert official_padding(720, 1280) == Padding(0, 0, 0, 0)
    assert official_padding(784, 1344) == Padding(left=0, right=64, top=0, bottom=64)
    assert official_padding(900, 64) == Padding(left=608, right=608, top=0, bottom=12)


def test_official_target_keeps_frames_between_its_bounds() -> None:
    assert official_target(240, 426, 4) == (960, 1704)
    assert official_target(101, 77, 2) == (720, 548)
    height, width = official_target(1000, 1999, 4)
    assert height % 2 == width % 2 == 0 and height * width <= 1280 * 2048
    assert official_target(361, 641, 2.0) == (722, 1282)


def test_crop_is_a_view_and_refuses_pictures_without_padding() -> None:
    padding = Padding(left=2, right=2, top=1, bottom=1)
    padded = torch.zeros(1, 3, 6, 9)
    padding.crop(padded).fill_(1)
    assert padded.sum() == 3 * 4 * 5
    with pytest.raises(ValueError, match="expected images padded by .*; got the shape \\(1, 3, 6, 4\\)"):
        padding.crop(padded[..., :4])


def test_wrong_sizes_are_refused() -> None:
    for call in (tight_padding, official_padding, lambda h, w: official_target(h, w, 4)):
        with pytest.raises(ValueError, match="expected frames of at least 1 x 1 pixels; got 0 x 5"):
            call(0, 5)
    with pytest.raises(ValueError, match="expected an upscale above 0; got 0"):
        official_target(5, 5, 0)
    with pytest.raises(ValueError, match="expected sides of at least 0 pixels"):
        Padding(left=-1, right=0, top=0, bottom=0)
