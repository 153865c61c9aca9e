"""The three losses: values by hand, and what is refused."""

import pytest
import torch
from diffattn.distill.training.losses import LossWeights, attention_loss, feature_loss, losses, squared_error


def test_values_by_hand() -> None:
    student, target, teacher = torch.tensor([1.0, 2.0]), torch.tensor([0.0, 0.0]), torch.tensor([1.0, 4.0])
    layers = [torch.tensor([1.0]), torch.tensor([[3.0, 3.0]])], [torch.tensor([0.0]), torch.tensor([[0.0, 0.0]])]
    found = losses(LossWeights(target=2, prediction=0.5, attention=0.1), student, target, teacher, *layers)
    assert found.values() == pytest.approx(
        {"target": 2.5, "prediction": 2.0, "attention": 5.0, "total": 2 * 2.5 + 0.5 * 2.0 + 0.1 * 5.0}
    )


def test_features_count_by_their_power() -> None:
    student, teacher = (
        [torch.tensor([3.0, 1.0]), torch.tensor([10.0])],
        [torch.tensor([1.0, 1.0]), torch.tensor([20.0])],
    )
    assert float(feature_loss(student, teacher)) == pytest.approx((2 / 1 + 100 / 400) / 2)
    none = torch.zeros(1)
    weights = LossWeights(target=0, prediction=0, attention=0, features=0.5)
    found = losses(weights, none, none, None, [], [], student, teacher)
    assert found.values() == pytest.approx({"features": 1.125, "total": 0.5625}) and weights.teacher


def test_losses_of_weight_0_are_not_computed() -> None:
    found = losses(LossWeights(target=1, prediction=0, attention=0), torch.ones(2), torch.zeros(2), None, [], [])
    assert (found.prediction, found.attention) == (None, None)
    assert found.values() == {"target": 1.0, "total": 1.0}
    assert not LossWeights(target=1, prediction=0, attention=0).teacher


def test_errors_are_taken_in_float32() -> None:
    student, wanted = torch.full((4096,), 300.0, dtype=torch.float16), torch.zeros(4096, dtype=torch.float16)
    assert squared_error(student, wanted) == 90_000  # beyond float16


def test_gradients_reach_the_student_alone() -> None:
    student, teacher = torch.ones(3, requires_grad=True), torch.zeros(3)
    attention_loss([student * 2], [teacher]).backward()
    assert torch.equal(student.grad, torch.full((3,), 8 / 3))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LossWeights(target=-1), "the weight of the target loss must be 0 or more, got -1"),
        (lambda: LossWeights(target=float("nan")), "must be 0 or more"),
        (lambda: LossWeights(target=0, prediction=0, attention=0), "nothing would be trained"),
        (lambda: attention_loss([], []), "choose at least one layer"),
        (lambda: attention_loss([torch.ones(1)], []), "got 1 of the student and 0 of the teacher"),
        (lambda: squared_error(torch.ones(2), torch.ones(3)), "one shape"),
        (lambda: feature_loss([], []), "the same blocks of both, got 0 and 0"),
        (
            lambda: losses(LossWeights(), torch.ones(1), torch.ones(1), None, [torch.ones(1)], [torch.ones(1)]),
            "needs the teacher's prediction",
        ),
    ],
)
def test_refusals(make, message) -> None:
    with pytest.raises(ValueError, match=message):
        make()
