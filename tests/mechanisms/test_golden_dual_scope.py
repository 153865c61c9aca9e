"""Dual-scope attention against numbers recorded from the official implementation."""

import pytest
import torch
from golden_clips import RECORDING, clean_mechanism, official_mechanism, project_out, projected
from golden_record import Record
from golden_vectors import GoldenCase, assert_golden, golden_cases
from torch import Tensor
from torch.nn import functional as F

from diffattn.grid import TokenGrid
from diffattn.mechanisms.base import Context, default_scale
from diffattn.mechanisms.dual_scope import DualScopeAttention
from diffattn.mechanisms.parts.scopes.attention import Keys, attend_scopes


def check_vanilla(case: GoldenCase, tensors: Record, q: Tensor, k: Tensor, v: Tensor) -> None:
    """Full attention of the same layer, where it was recorded too."""
    if "vanilla.full" in tensors:
        out = project_out(tensors, F.scaled_dot_product_attention(q, k, v))
        assert_golden("vanilla", out, tensors["vanilla.full"], case.tolerance)


def run_official(case: GoldenCase, tensors: Record) -> None:
    config = case.config
    config.told(*RECORDING)
    assert list(tensors["in.x"].shape) == config["x"]
    assert case.spec["frame_dim"] == 1 and case.spec["layout"] == "(B*H*W,F,C)"
    q, k, v = projected(config, tensors)
    grid, context = TokenGrid(1, 1, frames=q.shape[2]), Context(timestep=config["timestep"])
    check_vanilla(case, tensors, q, k, v)
    for world in config["Ws"]:
        mechanism = official_mechanism(config["plugin_configs"]["attn"], world)
        for name, attend in (("attend", mechanism.attend), ("reference", mechanism.reference)):
            out = project_out(tensors, attend(q, k, v, grid, context=context))
            assert_golden(f"{name} on {world} ranks", out, tensors[f"out.w{world}"], case.tolerance)


def in_clips(
    mechanism: DualScopeAttention, lengths: list[int], q: Tensor, k: Tensor, v: Tensor, context: Context
) -> Tensor:
    """Each clip by itself, with the frames around it and the global ones at hand, as a device of its own would."""
    frames, parts = q.shape[2], []
    assert sum(lengths) == frames
    shared_frames, none = mechanism.global_frames(frames), Keys(k[:, :, :0], v[:, :, :0])
    shared = Keys(k, v).pick(shared_frames, 1)
    for i, length in enumerate(lengths):
        first = sum(lengths[:i])
        around = range(max(first - mechanism.padding, 0), min(first + length + mechanism.padding, frames))
        local = Keys(k[:, :, around.start : around.stop], v[:, :, around.start : around.stop])
        parts.append(
            attend_scopes(
                q[:, :, first : first + length],
                *(local, shared, none, mechanism.scopes(context)),
                queries=range(first, first + length),
                local_frames=around,
                shared_frames=shared_frames,
                cells=1,
                scale=mechanism.attn_scale * default_scale(q),
                train_frames=mechanism.train_frames if mechanism.token_num_scale else None,
            )
        )
    return torch.cat(parts, dim=2)


def run_clean(case: GoldenCase, tensors: Record) -> None:
    mechanism = clean_mechanism(case.config)
    assert case.spec["frame_dim"] == 1
    q, k, v = projected(case.config, tensors)
    check_vanilla(case, tensors, q, k, v)
    grid, context = TokenGrid(1, 1, frames=q.shape[2]), Context()
    want = tensors["out.any_world_size"]
    for name, attend in (("attend", mechanism.attend), ("reference", mechanism.reference)):
        assert_golden(name, project_out(tensors, attend(q, k, v, grid, context=context)), want, case.tolerance)
    for lengths in case.spec["shard_lengths_to_test"]:
        out = project_out(tensors, in_clips(mechanism, lengths, q, k, v, context))
        assert_golden(f"clips of {lengths} frames", out, want, case.tolerance)


RUNNERS = {"temporal_attention": run_official, "temporal_attention_clean": run_clean}

ATTENTION = [
    case for case in golden_cases("video_infinity") if case.values[0] is None or case.values[0].kind in RUNNERS
]
"""`tests/parallel/test_golden_clips.py` takes all kinds, on real ranks, and fails on those it does not know."""


@pytest.mark.golden
@pytest.mark.parametrize("case", ATTENTION)
def test_golden(case: GoldenCase) -> None:
    RUNNERS[case.kind](case, case.tensors())
