"""Layers one by one: the teacher's input and output, gradients of the layer alone, and what comes of it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffattn.distill.data.samples import collate
from diffattn.distill.inputs import predict
from diffattn.distill.objective import add_noise
from diffattn.distill.student import make_student
from diffattn.distill.training.layerwise import LayerByLayer, relative_error
from diffattn.distill.training.log import LOG, read_log
from diffattn.distill.training.losses import LossWeights
from diffattn.distill.training.trainer import Trainer
from torch import Tensor
from toys import Noise, config, flux_model, scheduler

from diffattn import ClearAttention, HaloAttention


def forward(model: Any) -> Tensor:
    batch = collate(Noise(), range(2), 0)
    return predict(model, add_noise(scheduler(), batch), batch.conditioning, None)


def shake(student: Any) -> None:
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in student.parameters.values():
            weight.add_(torch.randn_like(weight) * 0.1)


@pytest.mark.parametrize("trainable", ["projections", "lora"])
def test_the_forward_is_the_teachers_and_each_layer_has_the_gradients_of_its_own_error(trainable: Any) -> None:
    model = flux_model()
    with torch.no_grad():
        original = forward(model)
    student = make_student(model, ClearAttention(radius=2), trainable=trainable)
    shake(student)
    inputs: dict[str, Any] = {}
    hooks = [
        layer.module.register_forward_pre_hook(
            lambda module, args, kwargs, name=layer.name: inputs.setdefault(name, (args, kwargs)), with_kwargs=True
        )
        for layer in student.handle.layers
    ]
    with student.teacher():
        forward(model)
    [hook.remove() for hook in hooks]
    with LayerByLayer(student, lambda loss: loss.backward()) as lessons:
        out = forward(model)
    assert torch.equal(out, original) and not out.requires_grad and torch.is_grad_enabled()
    got = {name: weight.grad.clone() for name, weight in student.parameters.items()}
    [setattr(weight, "grad", None) for weight in student.parameters.values()]
    # By hand, layer by layer, from the inputs of the teacher's pass: inside a forward, for the grid to be known
    total = 0.0
    for layer in student.handle.layers:
        args, kwargs = inputs[layer.name]
        found: list[Tensor] = []

        def again(
            module: Any, a: Any, k: Any, output: Any, args: Any = args, kwargs: Any = kwargs, found: Any = found
        ) -> None:
            if found or getattr(module, "busy", False):
                return
            module.busy = True
            own = module(*args, **kwargs)
            with student.teacher():
                wanted = module(*args, **kwargs)
            module.busy = False
            found.append(relative_error(own, wanted))

        hook = layer.module.register_forward_hook(again, with_kwargs=True)
        forward(model)
        hook.remove()
        (found[0] / len(student.handle.layers)).backward()
        total += float(found[0].detach()) / len(student.handle.layers)
    assert lessons.loss == pytest.approx(total, rel=1e-6)
    for name, weight in student.parameters.items():
        torch.testing.assert_close(got[name], weight.grad, atol=1e-7, rtol=1e-4)


def test_relative_error_by_hand() -> None:
    own, wanted = (torch.tensor([1.0, 2.0]), torch.tensor([3.0])), (torch.tensor([0.0, 1.0]), torch.tensor([1.0]))
    assert float(relative_error(own, wanted)) == pytest.approx((1 + 1 + 4) / (0 + 1 + 1))
    assert float(relative_error(own[0], wanted[0])) == pytest.approx(2.0)


def test_layers_that_did_not_run_and_layers_that_ran_twice_are_named() -> None:
    student = make_student(flux_model(), ClearAttention(radius=2))
    with LayerByLayer(student, lambda loss: None) as lessons:
        pass
    with pytest.raises(RuntimeError, match="did not run, such as transformer_blocks.0.attn"):
        _ = lessons.loss
    with pytest.raises(RuntimeError, match="ran twice"), LayerByLayer(student, lambda loss: None):
        forward(student.model)
        forward(student.model)
    assert torch.is_grad_enabled()
    assert forward(student.model).requires_grad


def trainer(folder: Path, **changes: Any) -> Trainer:
    chosen = config(**changes)
    student = make_student(
        flux_model(), chosen.mechanism, trainable=chosen.trainable, settings=chosen.settings if chosen.drawn else ()
    )
    return Trainer(chosen, student, scheduler(), Noise(), folder)


def weights(run: Trainer) -> Tensor:
    return torch.cat([weight.detach().flatten() for weight in run.student.parameters.values()])


def test_a_run_learns_by_layers_first_and_resumes_bit_for_bit(tmp_path: Path) -> None:
    changes: dict[str, Any] = {"layerwise": 4, "steps": 7, "rate": 3e-3}
    whole = trainer(tmp_path / "whole", **changes)
    whole.run()
    rows = read_log(tmp_path / "whole" / LOG)
    assert [("layers" in row, "prediction" in row) for row in rows] == [(True, False)] * 4 + [(False, True)] * 3
    assert rows[3]["layers"] < rows[0]["layers"]
    for stop in (2, 5):
        trainer(tmp_path / f"{stop}", **changes).run(until=stop)
        again = trainer(tmp_path / f"{stop}", **changes)
        again.run(resume=True)
        assert torch.equal(weights(again), weights(whole))


def test_accumulated_parts_equal_one_batch(tmp_path: Path) -> None:
    whole, parted = (trainer(tmp_path / str(n), layerwise=6, accumulation=n) for n in (1, 2))
    # a part's mean is over its own samples, whose powers differ a little
    assert parted.run().totals == pytest.approx(whole.run().totals, rel=2e-2)


def test_layers_of_mechanisms_with_features_of_the_block(tmp_path: Path) -> None:
    from diffattn import TokenMergeAttention

    run = trainer(tmp_path, mechanism=TokenMergeAttention(ratio=0.5), layerwise=2, steps=2)
    assert run.run().totals[0] > 0


def test_every_loss_weight_and_halo(tmp_path: Path) -> None:
    loss = LossWeights(target=0, prediction=0, attention=0, features=1.0)
    run = trainer(tmp_path, mechanism=HaloAttention(tile=4, halo=1), loss=loss, steps=40, rate=5e-3)
    totals = run.run().totals
    assert sum(totals[-10:]) < 0.8 * sum(totals[:10])
