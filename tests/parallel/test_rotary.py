"""Rotated keys and joint text on clips, against the formulas, one query at a time."""

from typing import Any

import pytest
import torch
from clip_splits import SPLITS, clip_of, plan_of
from parallel_ranks import on_ranks
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from diffattn.grid import TokenGrid
from diffattn.mechanisms.base import Context
from diffattn.mechanisms.dual_scope import DualScopeAttention
from diffattn.mechanisms.softmax import softmax_reference
from diffattn.parallel.operations.shares import FramePlan
from diffattn.parallel.rotary import RotaryClipAttention

CELLS, TEXT, PADDING, TOP_K, TRAINED = 2, 3, 1, 4, 5
FREQUENCIES = (1.0, 0.1)
MECHANISM = DualScopeAttention(
    padding=PADDING, top_k=TOP_K, train_frames=TRAINED, local_phase=(None, 1.5, 0.0), global_phase=None
)


def turned(x: Tensor, frames: Tensor | float) -> Tensor:
    """Rotated by complex numbers; the rest of the key as it is."""
    angles = torch.as_tensor(frames, dtype=torch.float64)[..., None] * torch.tensor(FREQUENCIES, dtype=torch.float64)
    pairs = torch.view_as_complex(x[..., : 2 * len(FREQUENCIES)].unflatten(-1, (-1, 2)).contiguous())
    pairs = pairs * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([torch.view_as_real(pairs).flatten(-2), x[..., 2 * len(FREQUENCIES) :]], dim=-1)


def reference(q: Tensor, k: Tensor, v: Tensor, frames: int) -> Tensor:
    """Unrotated `(b, h, text + frames cells, d)` in; distances and places by the formulas of the docstring."""
    last = frames - 1
    reach = min(TRAINED - 1, last)
    shared = list(dict.fromkeys(g * frames // TOP_K for g in range(TOP_K)))

    def cells(f: int) -> list[int]:
        return list(range(TEXT + f * CELLS, TEXT + (f + 1) * CELLS))

    outs = []
    for f in range(frames):
        near = [g for g in range(frames) if abs(g - f) <= PADDING]
        far = [g for g in shared if g not in near]
        parts = [turned(k[:, :, cells(g)], float(g - f)) for g in near]
        for g in far:
            distance = abs(g - f)
            distance = PADDING + (distance - PADDING) * (reach - PADDING) / (last - PADDING)
            parts.append(turned(k[:, :, cells(g)], distance if g > f else -distance))
        parts.append(turned(k[:, :, :TEXT], -f * reach / last))
        places = [place for g in near + far for place in cells(g)] + list(range(TEXT))
        bias = torch.zeros(len(places), dtype=torch.float64)
        bias[len(near) * CELLS : -TEXT] = -1.5  # the text has the larger bias, that of the window
        outs.append(softmax_reference(q[:, :, cells(f)], torch.cat(parts, 2), v[:, :, places], mask=bias))
    places = [*range(TEXT), *(place for g in shared for place in cells(g))]
    keys = [k[:, :, :TEXT], *(turned(k[:, :, cells(g)], g * reach / last) for g in shared)]
    text = softmax_reference(q[:, :, :TEXT], torch.cat(keys, 2), v[:, :, places])
    return torch.cat([text, *outs], dim=2)


def compared(mesh: DeviceMesh | None, lengths: tuple[int, ...]) -> None:
    plan = FramePlan(lengths) if mesh is None else plan_of(mesh, lengths)
    frames = plan.frames
    q, k, v = torch.randn(3, 2, 2, TEXT + frames * CELLS, 6).double().unbind(0)
    want = reference(q, k, v, frames)
    own = TokenGrid(1, CELLS, plan.length, before=TEXT)
    numbers = torch.tensor(list(plan.own), dtype=torch.float64).repeat_interleave(CELLS)

    def clip(x: Tensor, rotated: bool) -> Tensor:
        cells = clip_of(x[:, :, TEXT:].unflatten(2, (frames, CELLS)), plan, 2).flatten(2, 3)
        return torch.cat([x[:, :, :TEXT], turned(cells, numbers) if rotated else cells], dim=2)

    mechanism = RotaryClipAttention(mechanism=MECHANISM, plan=plan, frequencies=FREQUENCIES, joint_text=True)
    got = mechanism.attend(clip(q, True), clip(k, True), clip(v, False), own, context=Context())
    torch.testing.assert_close(got, clip(want, False), atol=1e-5, rtol=0)


@pytest.mark.dist
@pytest.mark.parametrize("lengths", [(12,), *SPLITS[1:]], ids=str)
def test_clips_give_the_formula(lengths: tuple[int, ...]) -> None:
    on_ranks(len(lengths), compared, lengths)


def gradient(mesh: DeviceMesh | None, lengths: tuple[int, ...]) -> Tensor:
    plan = FramePlan(lengths) if mesh is None else plan_of(mesh, lengths)
    x = torch.randn(1, 2, TEXT + plan.frames * CELLS, 6)
    weight = torch.randn(x.shape)
    grid = TokenGrid(1, CELLS, plan.length, before=TEXT)

    def clip(y: Tensor) -> Tensor:
        cells = clip_of(y[:, :, TEXT:].unflatten(2, (plan.frames, CELLS)), plan, 2).flatten(2, 3)
        return torch.cat([y[:, :, :TEXT], cells], dim=2)

    mechanism = RotaryClipAttention(mechanism=MECHANISM, plan=plan, frequencies=FREQUENCIES, joint_text=True)
    own = clip(x).requires_grad_()
    out: Any = mechanism.attend(own, own, own, grid) * clip(weight)
    out[:, :, TEXT:].sum().backward()
    assert own.grad is not None
    return own.grad[:, :, TEXT:]


@pytest.mark.dist
def test_gradients_are_those_of_one_process() -> None:
    torch.manual_seed(0)
    want = gradient(None, (12,))
    got = torch.cat(on_ranks(3, gradient, (5, 1, 6)), dim=2)
    torch.testing.assert_close(got, want, atol=1e-4, rtol=0)
