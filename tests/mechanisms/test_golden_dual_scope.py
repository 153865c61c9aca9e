"""Dual-scope attention against numbers recorded from the official implementation."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from golden_vectors import GoldenCase, assert_golden, golden_cases
from torch import Tensor
from torch.nn import functional as F

from diffattn.grid import TokenGrid
from diffattn.mechanisms.base import Context, default_scale
from diffattn.mechanisms.dual_scope import DualScopeAttention
from diffattn.mechanisms.scope_attention import Keys, attend_scopes
from diffattn.mechanisms.scopes import Phase

Tensors = Mapping[str, Tensor]


def take(config: dict[str, Any], *known: str, optional: tuple[str, ...] = ()) -> list[Any]:
    """The values of `known` keys, then of `optional` ones; a key that is missing or that nobody asked for fails."""
    unknown = (set(config) ^ set(known)) - set(optional)
    assert not unknown, f"config keys this test does not handle, or misses: {sorted(unknown)}"
    return [config[key] for key in known] + [config.get(key) for key in optional]


def project(tensors: Tensors, heads: int, head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    def part(name: str) -> Tensor:
        out = F.linear(tensors["in.x"], tensors[f"weights.to_{name}.weight"], tensors.get(f"weights.to_{name}.bias"))
        return out.unflatten(-1, (heads, head_dim)).transpose(1, 2)

    return part("q"), part("k"), part("v")


def project_out(tensors: Tensors, out: Tensor) -> Tensor:
    tokens = out.transpose(1, 2).flatten(2)
    return F.linear(tokens, tensors["weights.to_out.0.weight"], tensors.get("weights.to_out.0.bias"))


def phase(values: dict[str, Any] | None) -> Phase | None:
    return None if values is None else Phase(*take(values, "t", "local_biase", "global_biase"))


def official_mechanism(plugin: dict[str, Any], clips: int) -> DualScopeAttention:
    padding, top_k, _, attn_scale, by_number, dynamic, local, global_ = take(
        plugin,
        *("padding", "top_k", "top_k_chunk_size", "attn_scale", "token_num_scale", "dynamic_scale"),
        optional=("local_phase", "global_phase"),
    )
    assert not dynamic or (local and global_)
    return DualScopeAttention(
        padding=padding,
        top_k=top_k,
        attn_scale=attn_scale,
        token_num_scale=by_number,
        local_phase=phase(local) if dynamic else None,
        global_phase=phase(global_) if dynamic else None,
        official=True,
        clips=clips,
    )


def run_official(case: GoldenCase, tensors: Tensors) -> None:
    _, dim, heads, head_dim, _, _, _, plugins, timestep, worlds, shape = take(
        case.config,
        *("kind", "dim", "heads", "dim_head", "weight_seed", "input_seed", "gain", "plugin_configs", "timestep"),
        *("Ws", "x"),
    )
    (plugin,) = take(plugins, "attn")
    assert list(tensors["in.x"].shape) == shape and shape[-1] == dim
    assert case.spec["frame_dim"] == 1 and case.spec["layout"] == "(B*H*W,F,C)"
    q, k, v = project(tensors, heads, head_dim)
    grid, context = TokenGrid(1, 1, frames=shape[1]), Context(timestep=timestep)
    assert_golden("vanilla", project_out(tensors, F.scaled_dot_product_attention(q, k, v)), tensors["vanilla.full"],
                  case.tolerance)  # fmt: skip
    assert {f"out.w{world}" for world in worlds} == {name for name in tensors if name.startswith("out.")}
    for world in worlds:
        mechanism = official_mechanism(plugin, world)
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


def run_clean(case: GoldenCase, tensors: Tensors) -> None:
    _, dim, heads, head_dim, padding, top_k, local_bias, global_bias, attn_scale, by_number, once = take(
        case.config,
        *("kind", "dim", "heads", "dim_head", "padding", "top_k", "local_bias", "global_bias", "attn_scale"),
        *("token_num_scale", "dedup_global_in_window"),
    )
    assert not once or local_bias >= global_bias, "a frame seen once keeps the larger bias: this is another rule"
    mechanism = DualScopeAttention(
        padding=padding,
        top_k=top_k,
        attn_scale=attn_scale,
        token_num_scale=by_number,
        local_phase=Phase(None, local_bias, global_bias),
        global_phase=None,
        duplicates=not once,
    )
    q, k, v = project(tensors, heads, head_dim)
    assert tensors["in.x"].shape[-1] == dim
    grid, context = TokenGrid(1, 1, frames=q.shape[2]), Context()
    want = tensors["out.any_world_size"]
    for name, attend in (("attend", mechanism.attend), ("reference", mechanism.reference)):
        assert_golden(name, project_out(tensors, attend(q, k, v, grid, context=context)), want, case.tolerance)
    for lengths in case.spec["shard_lengths_to_test"]:
        out = project_out(tensors, in_clips(mechanism, lengths, q, k, v, context))
        assert_golden(f"clips of {lengths} frames", out, want, case.tolerance)


RUNNERS = {"temporal_attention": run_official, "temporal_attention_clean": run_clean}


@pytest.mark.golden
@pytest.mark.parametrize("case", golden_cases("video_infinity"))
def test_golden(case: GoldenCase) -> None:
    assert case.kind in RUNNERS, f"no runner for the kind {case.kind!r}; there are {', '.join(RUNNERS)}"
    RUNNERS[case.kind](case, case.tensors())
