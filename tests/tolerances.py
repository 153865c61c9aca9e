"""How far a result may lie from its reference: the largest absolute difference on unit-normal inputs."""

import torch
from torch import Tensor

TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 2e-2}


def assert_close(got: Tensor, want: Tensor, name: str = "result") -> None:
    """Compare by `got`'s dtype; `want` may have a finer one."""
    torch.testing.assert_close(
        got.to(want.dtype), want, atol=TOLERANCE[got.dtype], rtol=0.0, msg=lambda text: f"{name} ({got.dtype}): {text}"
    )
