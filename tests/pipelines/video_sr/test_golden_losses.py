"""The released loss against recorded numbers; files that no test of the set knows fail here."""

import json
import re

import pytest
import torch
from diffattn.pipelines.video_sr.training.losses import DynamicFrequencyLoss, star_loss
from golden_record import Record
from golden_star import group_of, star_cases
from golden_vectors import GoldenCase, assert_golden
from safetensors.torch import save_file
from torch import Tensor

Tensors = dict[str, Tensor]

RELEASED = DynamicFrequencyLoss(mode="released")

RECORDED = {"pred_x0_video", "gt_video", "v_pred", "v_target", "low_pred", "high_pred"}
"""Tensors of a case with clips; the others have their means alone."""


@pytest.mark.golden
@pytest.mark.parametrize("case", star_cases("losses"))
def test_losses(case: GoldenCase) -> None:
    assert group_of(case.name) == "losses", f"a file that no test knows: {case.path.name}"
    tensors = case.tensors()
    for one in case.spec["cases"]:
        own = tensors.under(f"{one['id']}/")
        if set(own) == RECORDED:
            check_clip(one, own, case)
        elif set(own) == {"x", "low_abs_mean", "high_abs_mean"}:
            check_means(one, own, case)
        else:
            raise AssertionError(f"a kind of case that no test knows: {one['id']} with {sorted(own)}")
    if "balance" in case.spec:
        check_balance(case.spec["balance"], tensors.under("balance/"), case)


def check_clip(one: Record, own: Tensors, case: GoldenCase) -> None:
    prediction, target = own["pred_x0_video"], own["gt_video"]
    assert list(prediction.shape) == one["shape"]
    low, high = RELEASED.split(prediction[0].transpose(0, 1))
    assert_golden("low_pred", torch.view_as_real(low), own["low_pred"], case.tolerance)
    assert_golden("high_pred", torch.view_as_real(high), own["high_pred"], case.tolerance)
    assert one["results"], f"expected results of case {one['id']}; got none"
    for want in one["results"]:
        check_result(want, own, prediction, target, case)


def check_result(want: Record, own: Tensors, prediction: Tensor, target: Tensor, case: GoldenCase) -> None:
    timestep = torch.tensor([want["t"]])
    coarse, weight = RELEASED.weights(timestep)
    low, high = RELEASED.bands(prediction, target)
    got = star_loss(own["v_pred"], own["v_target"], prediction, target, timestep, RELEASED)
    numbers = {
        "ct": coarse,
        "weight_t": weight,
        "loss_low": low,
        "loss_high": high,
        "loss_t": 0.01 * (coarse * low + (1 - coarse) * high),
        "loss_v": got.velocity,
        "loss": got.total,
    }
    assert set(want) == {"t", *numbers}, f"results that no test knows: {sorted(set(want) - set(numbers) - {'t'})}"
    for name, number in numbers.items():
        assert_golden(f"t={want['t']} {name}", number.reshape(()), torch.tensor(want[name]), case.tolerance)
    frequency = torch.tensor(want["weight_t"] * want["loss_t"])
    assert_golden(f"t={want['t']} frequency", got.frequency, frequency, {**case.tolerance, "atol": 1e-8})


def check_means(one: Record, own: Tensors, case: GoldenCase) -> None:
    """Of a clip whose quantile may be that of a sample: exact where it is not, by the tolerance noted where it is."""
    torch.manual_seed(one["manual_seed"])
    assert list(own["x"].shape) == one.get("shape", list(own["x"].shape))
    bands = RELEASED.split(own["x"][0].transpose(0, 1))
    noted = re.search(r"rtol (\d[\d.e+-]*)", one.get("note", ""))
    loose = {"rtol": float(noted[1]), "atol": 0.0} if noted else case.tolerance
    for band, name in zip(bands, ("low_abs_mean", "high_abs_mean"), strict=True):
        tolerance = case.tolerance if band.numel() <= 10_000 else loose
        assert_golden(name, torch.view_as_real(band).abs().mean(), own[name], tolerance)


def check_balance(balance: float, own: Tensors, case: GoldenCase) -> None:
    bands = DynamicFrequencyLoss(mode="released", balance=balance).split(own["x"])
    for name, band in zip(("low", "high"), bands, strict=True):
        assert_golden(f"balance/{name}", torch.view_as_real(band), own[name], case.tolerance)


def test_a_file_that_no_test_knows_fails(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("DIFFATTN_GOLDEN", str(tmp_path))
    (tmp_path / "star").mkdir()
    for name in ("gaze", "df_loss"):
        (tmp_path / "star" / f"{name}.json").write_text(json.dumps({"cases": [{"id": 0}], "tensors": {}}))
        save_file({"0/y": torch.zeros(1)}, tmp_path / "star" / f"{name}.safetensors")
    known, unknown = star_cases("losses")
    with pytest.raises(AssertionError, match=re.escape("a file that no test knows: gaze.json")):
        test_losses(*unknown.values)
    with pytest.raises(AssertionError, match=re.escape("a kind of case that no test knows: 0 with ['y']")):
        test_losses(*known.values)
