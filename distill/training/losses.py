"""What a student is held to: the data, and the teacher's prediction, attention and features. Mean squared errors.

    L = w_t |p - target|^2 + w_p |p - p_teacher|^2 + w_a mean over layers |a - a_teacher|^2
        + w_f mean over layers |f - f_teacher|^2 / |f_teacher|^2

with p the student's prediction, target the velocity or the noise of the data (`objective.py`), a what an attention
layer puts out, and f what the block around it puts out. CLEAR (Liu et al., arXiv 2412.16112, section 3.3) and LinFusion
(arXiv 2409.02097) use w = 1, 0.5, 0.5, 0. Features of chosen layers are the idea of TransKD (Liu et al., arXiv
2202.13393), whose student is a smaller model with features of other sizes; here both are of one size.
All are computed in float32.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Annotated

import torch
from torch import Tensor

from diffattn.options import Must, read

WEIGHT = Annotated[float, Must("0 or more", lambda weight: weight >= 0)]


@dataclass(frozen=True, kw_only=True)
class LossWeights:
    """Weights of the losses; those of 0 are not computed."""

    target: float = 1.0
    prediction: float = 0.5
    attention: float = 0.5
    features: float = 0.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = read(f"the weight of the {field.name} loss", getattr(self, field.name), WEIGHT)
            object.__setattr__(self, field.name, value)
        if not any(getattr(self, field.name) for field in fields(self)):
            raise ValueError("all loss weights are 0: nothing would be trained")

    @property
    def teacher(self) -> bool:
        """Is a teacher's pass needed?"""
        return bool(self.prediction or self.attention or self.features)


def squared_error(student: Tensor, wanted: Tensor) -> Tensor:
    """Mean squared error in float32, a scalar; both tensors of one shape."""
    if student.shape != wanted.shape:
        raise ValueError(f"a loss compares tensors of one shape, got {list(student.shape)} and {list(wanted.shape)}")
    return (student.float() - wanted.float()).square().mean()


def attention_loss(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """The mean over layers of the squared errors of their attention outputs, a scalar."""
    if not student or len(student) != len(teacher):
        raise ValueError(
            f"the attention loss needs the same layers of both, got {len(student)} of the student and {len(teacher)} "
            f"of the teacher; choose at least one layer"
        )
    errors = [squared_error(own, wanted) for own, wanted in zip(student, teacher, strict=True)]
    total = errors[0]
    for error in errors[1:]:
        total = total + error
    return total / len(errors)


def feature_loss(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """The mean over tensors of their squared errors over the teacher's squares, a scalar."""
    if not student or len(student) != len(teacher):
        raise ValueError(f"the feature loss needs the same blocks of both, got {len(student)} and {len(teacher)}")
    errors = [
        squared_error(own, wanted) / wanted.float().square().mean().clamp(min=1e-12)
        for own, wanted in zip(student, teacher, strict=True)
    ]
    return torch.stack(errors).mean()


@dataclass(frozen=True)
class Losses:
    """The losses, unweighted, and their weighted sum; None where a weight is 0."""

    target: Tensor | None
    prediction: Tensor | None
    attention: Tensor | None
    features: Tensor | None
    total: Tensor

    def values(self) -> dict[str, float]:
        """Plain numbers, for a log."""
        named = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: float(value.detach()) for name, value in named.items() if value is not None}


def losses(
    weights: LossWeights,
    prediction: Tensor,
    target: Tensor,
    teacher: Tensor | None,
    attention: Sequence[Tensor],
    teacher_attention: Sequence[Tensor],
    features: Sequence[Tensor] = (),
    teacher_features: Sequence[Tensor] = (),
) -> Losses:
    """All losses with a weight; `teacher` may be None where none of them needs it."""
    of_target = squared_error(prediction, target) if weights.target else None
    of_prediction, of_attention, of_features = None, None, None
    if weights.prediction:
        if teacher is None:
            raise ValueError("the prediction loss needs the teacher's prediction, got None")
        of_prediction = squared_error(prediction, teacher)
    if weights.attention:
        of_attention = attention_loss(attention, teacher_attention)
    if weights.features:
        of_features = feature_loss(features, teacher_features)
    parts = (
        (weights.target, of_target),
        (weights.prediction, of_prediction),
        (weights.attention, of_attention),
        (weights.features, of_features),
    )
    total = sum((weight * loss for weight, loss in parts if loss is not None), start=prediction.new_zeros(()).float())
    return Losses(of_target, of_prediction, of_attention, of_features, total)
