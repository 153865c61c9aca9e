import pytest
import torch
from diffattn.pipelines.video_sr.i2vgenxl.guidance import guide
from torch import Tensor


def prediction(seed: int, dtype: torch.dtype = torch.float32, frames: int = 3) -> Tensor:
    return torch.randn(2, 4, frames, 5, 7, generator=torch.Generator().manual_seed(seed)).to(dtype)


def test_scale_moves_away_from_the_unconditional_prediction() -> None:
    c, u = prediction(0), prediction(1)
    torch.testing.assert_close(guide(c, u, 7.5), u + 7.5 * (c - u))
    torch.testing.assert_close(guide(c, u, 0.0), u)


def test_rescaling_brings_the_deviation_back_in_part() -> None:
    c, u = prediction(0), prediction(1)
    c[1] *= 3
    guided = guide(c, u, 7.5)
    for rescale in (0.2, 1.0):
        for k in range(2):
            gain = rescale * c[k].std() / guided[k].std() + (1 - rescale)
            torch.testing.assert_close(guide(c, u, 7.5, rescale)[k], gain * guided[k])
    torch.testing.assert_close(guide(c, u, 7.5, 1.0)[0].std(), c[0].std())


def test_numbers_by_hand() -> None:
    c, u = torch.tensor([[1.0, 2.0]]), torch.tensor([[0.0, 4.0]])
    # g = 2, 0 with twice the deviation of c.
    torch.testing.assert_close(guide(c, u, 2.0, 0.5), torch.tensor([[2.0, 0.0]]) * (0.5 * 0.5 + 0.5))


def test_windows_have_their_own_gain() -> None:
    c, u = prediction(0), prediction(1)
    c[:, :, 2] *= 10
    whole, window = guide(c, u, 7.5, 0.2), guide(c[:, :, :2], u[:, :, :2], 7.5, 0.2)
    ratio = window / whole[:, :, :2]
    torch.testing.assert_close(ratio, ratio[:, :1, :1, :1, :1].expand_as(ratio), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(ratio, torch.ones_like(ratio), atol=1e-3)


def test_scale_one_needs_no_unconditional_prediction() -> None:
    c = prediction(0)
    assert guide(c, None, 1.0, 0.2) is c


def test_one_frame_and_flat_predictions_stay_finite() -> None:
    c = prediction(0, frames=1)
    assert bool(guide(c, prediction(1, frames=1), 7.5, 0.2).isfinite().all())
    assert bool(guide(torch.zeros_like(c), torch.zeros_like(c), 7.5, 0.2).isfinite().all())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_worked_out_in_float32(dtype: torch.dtype) -> None:
    c, u = prediction(0, dtype), prediction(1, dtype)
    got, want = guide(c, u, 7.5, 0.2), guide(c.float(), u.float(), 7.5, 0.2)
    assert got.dtype == dtype and torch.equal(got, want.to(dtype))
    large = torch.full_like(c, 30000.0)
    large[:, 0] = -30000.0
    assert bool(guide(large, large * 0.9, 7.5, 1.0).isfinite().all())


@pytest.mark.parametrize(
    ("uncond", "rescale", "message"),
    [
        (None, 0.2, "for a scale of 7.5; got None"),
        (prediction(1, frames=2), 0.2, "expected uncond of the shape .*; got \\(2, 4, 2, 5, 7\\)"),
        (prediction(1), 1.1, "expected a rescale from 0 to 1; got 1.1"),
    ],
)
def test_wrong_input_is_refused(uncond: Tensor | None, rescale: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        guide(prediction(0), uncond, 7.5, rescale)
