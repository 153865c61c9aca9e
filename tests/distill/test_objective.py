"""Noise, targets and model inputs of every family that can be distilled."""

from typing import Any

import pytest
import torch
from diffattn.distill.data.samples import Batch, Sample, collate, index_at, places
from diffattn.distill.inputs import inputs_of, pack, predict, unpack
from diffattn.distill.objective import Noised, Span, add_noise
from diffattn.distill.student import make_student
from diffattn.distill.training.capture import Capture
from diffattn.distill.training.losses import squared_error
from diffusers import (
    CogVideoXDDIMScheduler,
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    UniPCMultistepScheduler,
)
from models import BUILDERS, Tiny
from torch import Tensor, nn

from diffattn import ClearAttention


def batch(*shape: int, uniform: float = 0.3) -> Batch:
    return Batch(torch.randn(shape), {}, torch.randn(shape), torch.full((shape[0],), uniform))


def test_flow_matching_goes_from_noise_to_latents() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    one = batch(2, 4, 6, 6)
    noised = add_noise(scheduler, one)
    sigma = scheduler.sigmas[300]
    assert torch.equal(noised.level, sigma.expand(2)) and torch.equal(noised.timestep, 1000 * sigma.expand(2))
    torch.testing.assert_close(noised.latents, (1 - sigma) * one.latents + sigma * one.noise)
    torch.testing.assert_close(noised.latents - sigma * noised.target, one.latents)


def test_the_training_grid_does_not_move_with_inference() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler()
    before = add_noise(scheduler, batch(1, 4, 2, 2)).level
    scheduler.set_timesteps(4)
    assert torch.equal(add_noise(scheduler, batch(1, 4, 2, 2)).level, before)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("cls", [DDPMScheduler, DDIMScheduler, CogVideoXDDIMScheduler])
def test_ddpm_targets_are_the_schedulers(cls: Any, kind: str) -> None:
    scheduler = cls(prediction_type=kind)
    one = batch(2, 4, 6, 6)
    noised = add_noise(scheduler, one)
    torch.testing.assert_close(noised.latents, scheduler.add_noise(one.latents, one.noise, noised.timestep))
    wanted = one.noise if kind == "epsilon" else scheduler.get_velocity(one.latents, one.noise, noised.timestep)
    torch.testing.assert_close(noised.target, wanted)
    assert noised.timestep.tolist() == [300, 300]


def test_the_first_and_last_place_of_the_grid() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler()
    assert add_noise(scheduler, batch(1, 1, 2, 2, uniform=0.0)).level == 1
    assert 0 < add_noise(scheduler, batch(1, 1, 2, 2, uniform=0.99999997)).level < 0.002


@pytest.mark.parametrize("cls", [UniPCMultistepScheduler, DPMSolverMultistepScheduler])
def test_solvers_by_flow_sigmas_are_flow_matching(cls: Any) -> None:
    scheduler = cls(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    one = batch(2, 4, 6, 6, uniform=0.4)
    noised = add_noise(scheduler, one)
    scheduler.set_timesteps(1000)  # its steps are a thousandth of the grid shorter
    sigma = noised.level[0]
    assert abs(float(scheduler.sigmas[400]) - float(sigma)) < 1e-3
    assert noised.timestep.tolist() == [int(1000 * sigma)] * 2
    torch.testing.assert_close(noised.latents, (1 - sigma) * one.latents + sigma * one.noise)
    assert torch.equal(noised.target, one.noise - one.latents)
    # A step of the solver to no noise at all, by the right answer, gives the latents back.
    scheduler.set_timesteps(1)
    torch.testing.assert_close(
        scheduler.step(one.noise - one.latents, scheduler.timesteps[0], one.noise)[0], one.latents, atol=5e-3, rtol=0
    )


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("solver", [True, False])
def test_a_span_has_the_levels_at_which_the_pipeline_calls_its_model(shift: float, solver: bool) -> None:
    scheduler: Any = FlowMatchEulerDiscreteScheduler(shift=shift)
    if solver:
        scheduler = UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift, final_sigmas_type="sigma_min"
        )
    numbers = torch.linspace(0, 1, 4001)[:-1]
    many = Batch(torch.zeros(4000, 1), {}, torch.zeros(4000, 1), numbers)
    whole = add_noise(scheduler, many).timestep.unique()
    high = add_noise(Span(scheduler, least=900), many).timestep
    low = add_noise(Span(scheduler, below=900), many).timestep
    assert high.min() >= 900 > low.max()
    assert torch.equal(torch.cat([low.unique(), high.unique()]), whole) and len(whole) > 500
    counts = high.unique(return_counts=True)[1]
    assert counts.max() - counts.min() <= max(1, 4000 // len(counts)), "all of them are equally likely"
    with pytest.raises(ValueError, match="no timestep of .* from 0 to 0.*is never called"):
        add_noise(Span(scheduler, below=0.0), many)


def test_schedulers_without_a_target_are_refused() -> None:
    with pytest.raises(ValueError, match="has flow sigmas and prediction_type 'epsilon', expected flow_prediction"):
        add_noise(UniPCMultistepScheduler(use_flow_sigmas=True), batch(1, 1, 2, 2))
    with pytest.raises(ValueError, match="prediction_type 'flow_prediction' has no target"):
        add_noise(UniPCMultistepScheduler(prediction_type="flow_prediction"), batch(1, 1, 2, 2))
    with pytest.raises(ValueError, match="prediction_type 'sample' has no target"):
        add_noise(DDPMScheduler(prediction_type="sample"), batch(1, 1, 2, 2))
    scheduler = type("Oracle", (), {"config": DDPMScheduler().config})()
    with pytest.raises(ValueError, match="Oracle is neither a flow-matching nor a DDPM scheduler"):
        add_noise(scheduler, batch(1, 1, 2, 2))


def test_packing_is_flux_own() -> None:
    latents = torch.randn(2, 4, 6, 10)
    packed = FluxPipeline._pack_latents(latents, 2, 4, 6, 10)
    assert torch.equal(pack(latents), packed)
    assert torch.equal(unpack(packed, latents), latents)


FAMILIES = ["Flux", "SD3", "SD3.5", "Wan", "CogVideoX", "CogVideoX-1.5", "PixArt", "SD1.5", "SDXL"]


def latents_of(name: str, case: Tiny) -> tuple[Tensor, dict[str, Tensor]]:
    """Latents and conditioning out of the arguments that the family tests use."""
    inputs = dict(case.inputs)
    first = inputs.pop("sample" if "sample" in inputs else "hidden_states")
    inputs.update(inputs.get("added_cond_kwargs") or {})
    for other in ("timestep", "img_ids", "txt_ids", "guidance", "added_cond_kwargs"):
        inputs.pop(other, None)
    if name == "Flux":
        ids = case.inputs["img_ids"]
        height, width = (int(ids[:, axis].max()) + 1 for axis in (1, 2))
        first = unpack(first, torch.empty(len(first), first.shape[2] // 4, 2 * height, 2 * width))
    if name.startswith("CogVideoX"):
        first = first.transpose(1, 2)
    return first, {key: value for key, value in inputs.items() if isinstance(value, Tensor)}


@pytest.mark.parametrize("name", FAMILIES)
def test_families_predict_in_the_shape_of_their_latents_and_can_learn(name: str) -> None:
    case = BUILDERS[name]()
    latents, conditioning = latents_of(name, case)
    noised = Noised(latents, torch.full((len(latents),), 300), torch.full((len(latents),), 0.3), latents)
    with torch.no_grad():
        original = predict(case.model, noised, conditioning, None)
    assert original.shape == latents.shape
    student = make_student(case.model, ClearAttention(radius=1.5))
    capture = Capture(case.model, [student.handle.layers[0].name])
    with student.teacher(), capture:
        assert torch.equal(predict(case.model, noised, conditioning, None), original)
    wanted = capture.outputs[0]
    with capture:
        prediction = predict(case.model, noised, conditioning, None)
    (squared_error(prediction, original) + squared_error(capture.outputs[0], wanted)).backward()
    gradients = {key: weight.grad for key, weight in student.parameters.items()}
    assert all(gradient is not None for gradient in gradients.values())
    assert any(gradient.abs().max() > 0 for gradient in gradients.values() if gradient is not None)


def test_unknown_families_name_the_known_ones() -> None:
    with pytest.raises(ValueError, match="Linear cannot be distilled yet; known: FluxTransformer2DModel"):
        inputs_of(nn.Linear(1, 1))


class Numbers:
    """Samples that know their index."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def sample(self, index: int, generator: torch.Generator) -> Sample:
        size = 2 if index < 90 else 3
        return Sample(f"number {index}", torch.full((1, size, 2), float(index)), {"index": torch.tensor(index)})


def test_every_epoch_shows_every_sample_once_in_another_order() -> None:
    first, second = ([index_at(place, 7, 0) for place in range(7 * e, 7 * e + 7)] for e in (0, 1))
    assert sorted(first) == sorted(second) == list(range(7))
    assert first != second
    assert first != [index_at(place, 7, 1) for place in range(7)]


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_parts_of_a_batch_are_the_batch(parts: int) -> None:
    whole = collate(Numbers(11), places(3, 8, 0, 1), 5)
    cut = [collate(Numbers(11), places(3, 8, part, parts), 5) for part in range(parts)]
    for name in ("latents", "noise", "uniform"):
        assert torch.equal(torch.cat([getattr(part, name) for part in cut]), getattr(whole, name))
    assert len(set(whole.uniform.tolist())) == 8


def test_batches_that_cannot_be_made() -> None:
    with pytest.raises(ValueError, match="a batch of 6 does not split into 4 equal parts"):
        places(0, 6, 0, 4)
    with pytest.raises(ValueError, match=r"one size, got number \d+ is \[1, \d, 2\], number"):
        collate(Numbers(100), range(100), 0)
