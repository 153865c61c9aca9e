"""What gates do is measured: their ranges, and the change without them, for weights of different deviation."""

import dataclasses

import pytest
import tiny_star
import torch
from diffattn.pipelines.video_sr.gates import GateReport, measure_gates
from diffattn.pipelines.video_sr.i2vgenxl.networks.controlnet import STARControlNetModel
from diffattn.pipelines.video_sr.i2vgenxl.networks.unet import STARUNet3DConditionModel
from diffattn.pipelines.video_sr.liem import LIEMSpatial, LIEMTemporal

SIZE = {"frames": 2, "height": 10, "width": 16}


def networks(deviation: float | None = 1.0) -> tuple[STARUNet3DConditionModel, STARControlNetModel]:
    """None: gates as they are at first."""
    made = tiny_star.unet(), tiny_star.controlnet()
    for network in made:
        for module in network.modules():
            if isinstance(module, LIEMSpatial | LIEMTemporal):
                if deviation is None:
                    module.conv1.reset_parameters()
                else:
                    module.conv1.weight.data.mul_(deviation)
    return made


@pytest.mark.slow
def test_small_gates_do_nothing_and_large_ones_do() -> None:
    """The order of the magnitudes recorded for a random network: 1e-4 at first and for 0.1, then 0.04 and 0.26."""
    first, *changes = [measure_gates(*networks(deviation), **SIZE).change for deviation in (None, 0.1, 0.3, 1.0)]
    assert first < 5e-3 and changes[0] < 5e-3 < changes[1] < 0.15 < changes[2] < 0.6
    assert changes == sorted(changes)


def test_the_gates_of_either_network_count() -> None:
    """Constant gates of 1/2 do next to nothing, so that the change is the other network's."""
    (unet, controlnet), (still, calm) = networks(1.0), networks(0.0)
    assert measure_gates(still, calm, **SIZE).change < 1e-3
    assert measure_gates(unet, calm, **SIZE).change > 0.05
    assert measure_gates(still, controlnet, **SIZE).change > 0.02


def test_rows_are_the_gates_of_both_networks() -> None:
    unet, controlnet = networks()
    report = measure_gates(unet, controlnet, **SIZE)
    want = [
        (name, key.removesuffix(".conv1.weight"))
        for name, network in (("unet", unet), ("controlnet", controlnet))
        for key in network.state_dict()
        if ".local" in key
    ]
    assert sorted((row.network, row.module) for row in report.rows) == sorted(want)
    assert [row.network for row in report.rows] == [name for name, _ in want]
    for row in report.rows:
        assert 0 <= row.low < row.mean < row.high <= 1 and 0 <= row.acting <= 1
    assert max(row.acting for row in report.rows) > 0.1


def test_a_shut_gate_shows_in_its_row_alone() -> None:
    unet, controlnet = networks(0.0)
    report = measure_gates(unet, controlnet, **SIZE)
    assert {(row.low, row.mean, row.high, row.acting) for row in report.rows} == {(0.5, 0.5, 0.5, 0.0)}
    block = unet.mid_block.temp_attentions[0].transformer_blocks[0]
    block.local2.conv1.weight.data.copy_(torch.tensor([[-1e4, 0.0]]))
    shut = [row for row in measure_gates(unet, controlnet, **SIZE).rows if row.acting > 0]
    assert [row.module for row in shut] == ["mid_block.temp_attentions.0.transformer_blocks.0.local2"]
    assert shut[0].network == "unet" and shut[0].low == 0 and shut[0].acting > 0.5


@pytest.mark.slow
def test_the_same_seed_gives_the_same_report() -> None:
    unet, controlnet = networks()
    one = measure_gates(unet, controlnet, seed=3, **SIZE)
    assert measure_gates(unet, controlnet, seed=3, **SIZE) == one
    for changes in ({"seed": 4}, {"seed": 3, "timestep": 20}, {"seed": 3, "frames": 3}, {"seed": 3, "width": 8}):
        assert measure_gates(unet, controlnet, **{**SIZE, **changes}).change != one.change


def test_networks_are_left_as_they_were() -> None:
    unet, controlnet = networks()
    want = measure_gates(unet, controlnet, **SIZE)
    unet.train()
    assert measure_gates(unet, controlnet, **SIZE) == want
    assert unet.training and not controlnet.training
    assert not any(m._forward_hooks for network in (unet, controlnet) for m in network.modules())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype) -> None:
    want = measure_gates(*networks(), **SIZE)
    got = measure_gates(*(network.to(dtype) for network in networks()), **SIZE)
    assert got.change == pytest.approx(want.change, rel=0.2)


def test_what_cannot_be_measured_is_refused() -> None:
    unet, controlnet = networks()
    with pytest.raises(ValueError, match="expected LIEMs in the controlnet; got none"):
        measure_gates(unet, STARControlNetModel.from_unet(tiny_star.unet(liem=False)))
    with pytest.raises(ValueError, match="pad or crop to"):
        measure_gates(unet, controlnet, height=12)
    assert not any(m._forward_hooks for network in (unet, controlnet) for m in network.modules())


def test_a_report_does_not_change() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        GateReport((), 0.0).change = 1.0
