"""Clips on real ranks against numbers recorded from the official implementation, and the traffic against its own.

The cases `*_clean` are not official: they hold for every split.
"""

from contextlib import ExitStack
from typing import Any

import pytest
import torch
from clip_splits import clip_of, plan_of
from diffusers import UNet3DConditionModel
from diffusers.models.resnet import TemporalConvLayer
from diffusers.models.transformers.transformer_temporal import TransformerTemporalModel
from golden_clips import Tensors, clean_mechanism, official_mechanism, project, project_out, take
from golden_vectors import GoldenCase, assert_golden, golden_cases
from parallel_ranks import on_ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from diffattn.grid import TokenGrid
from diffattn.mechanisms.base import Context
from diffattn.mechanisms.dual_scope import DualScopeAttention
from diffattn.parallel.attention import ClipAttention
from diffattn.parallel.frames import apply_on_clips
from diffattn.parallel.group_norm import distributed_group_norm
from diffattn.parallel.plan import FramePlan
from diffattn.parallel.unet3d import attach_unet3d


class Layer(nn.Module):
    """One layer of a UNet3D, called with the frames on axis 1."""

    def __init__(self, transformer_in: nn.Module | None = None, temp_conv: nn.Module | None = None) -> None:
        super().__init__()
        self.transformer_in, self.temp_conv = transformer_in, temp_conv

    def forward(self, sample: Tensor, timestep: Any, encoder_hidden_states: Tensor | None = None) -> Tensor:
        layer = self.transformer_in or self.temp_conv
        out = layer(sample.flatten(0, 1), num_frames=sample.shape[1])
        return (out if isinstance(out, Tensor) else out.sample).unflatten(0, sample.shape[:2])


Layer.__name__ = "UNet3DConditionModel"  # what its layers are found by


def load(module: nn.Module, tensors: Tensors) -> nn.Module:
    weights = {name.removeprefix("weights."): x for name, x in tensors.items() if name.startswith("weights.")}
    module.load_state_dict(weights, strict=True)
    return module.eval()


def traffic_of(plan: FramePlan, *labels: str) -> int:
    return sum(plan.traffic.sent.get(label, 0) for label in labels)


def check_traffic(case: GoldenCase, plan: FramePlan) -> None:
    """As many bytes in halos and norms as the released code puts in, and no more in global frames."""
    recorded = case.spec.get("collectives", {}).get(str(plan.ranks))
    if recorded is None or plan.ranks == 1:
        return
    theirs = recorded["per_rank"][plan.rank]["bytes_contributed"]
    assert set(theirs) <= {"all_gather_pair", "all_gather_world", "all_reduce"}
    assert traffic_of(plan, "halo", "conv") == theirs.get("all_gather_pair", 0)
    assert traffic_of(plan, "norm") == theirs.get("all_reduce", 0)
    assert traffic_of(plan, "gather") <= theirs.get("all_gather_world", 0)


def group_norm(case: GoldenCase, plan: FramePlan, tensors: Tensors) -> tuple[Tensor, int]:
    _, channels, groups, eps, _, _, _, shape = take(
        case.config, "kind", "channels", "groups", "eps", "weight_seed", "input_seed", "Ws", "x"
    )
    x = tensors["in.x"]
    assert list(x.shape) == shape and shape[1] == channels
    weight, bias = tensors["weights.weight"], tensors["weights.bias"]
    return distributed_group_norm(clip_of(x, plan, 2), groups, weight, bias, eps, plan), 2


def conv_layer(case: GoldenCase, plan: FramePlan, tensors: Tensors) -> tuple[Tensor, int]:
    official = ("weight_seed", "input_seed", "Ws", "x")
    _, channels, groups, *rest = take(case.config, "kind", "channels", "groups", optional=official)
    assert (None in rest) == (case.kind == "temporal_conv_clean")
    layer = Layer(temp_conv=load(TemporalConvLayer(channels, norm_num_groups=groups), tensors))
    with ExitStack() as stack:
        attach_unet3d(layer, plan, "official" if case.kind == "temporal_conv" else "clean", stack)
        return layer(clip_of(tensors["in.x"], plan, 1), 0), 1


def transformer(case: GoldenCase, plan: FramePlan, tensors: Tensors) -> tuple[Tensor, int]:
    _, heads, head_dim, channels, groups, synced, _, _, plugins, timestep, _, _ = take(
        case.config,
        *("kind", "heads", "dim_head", "channels", "groups", "distribute_group_norm", "weight_seed", "input_seed"),
        *("plugin_configs", "timestep", "Ws", "x"),
    )
    (plugin,) = take(plugins, "attn")
    module = TransformerTemporalModel(heads, head_dim, in_channels=channels, norm_num_groups=groups)
    layer = Layer(transformer_in=load(module, tensors))
    mechanism = official_mechanism(plugin, plan.ranks)
    with apply_on_clips(layer, plan, mechanism, mode="clean" if synced else "official"):
        return layer(clip_of(tensors["in.x"], plan, 1), torch.tensor(timestep)), 1


def unet(case: GoldenCase, plan: FramePlan, tensors: Tensors) -> tuple[Tensor, int]:
    _, mode, config, _, _, timestep, _, _, prompts, plugins = take(
        case.config,
        *("kind", "mode", "unet_config", "weight_seed", "input_seed", "timestep", "Ws", "x", "ehs", "plugin_configs"),
    )
    plugin, conv_3d, conv_layer = take(plugins, "attn", optional=("conv_3d", "conv_layer"))
    assert conv_3d in ({"padding": 1}, {}, None) and conv_layer in ({"padding": 4}, {}, None)
    assert (conv_layer is not None) == (mode == "default") and mode in ("default", "exact")
    text = tensors["in.encoder_hidden_states"]
    assert prompts in ("shared", "per_rank")
    if prompts == "per_rank":
        assert len(text) == plan.ranks
        of_frames = torch.cat(
            [part[:, None].expand(-1, n, -1, -1) for part, n in zip(text, plan.lengths, strict=True)], 1
        )
        text = text[plan.rank]
    model = load(UNet3DConditionModel(**config), tensors)
    clip = clip_of(tensors["in.x"], plan, 2)
    mechanism = official_mechanism(plugin, plan.ranks)
    with apply_on_clips(model, plan, mechanism, mode="official" if mode == "default" else "clean"):
        out = model(clip, timestep, text).sample
        check_traffic(case, plan)
        if prompts == "per_rank":  # the same by a prompt for each frame
            assert torch.equal(model(clip, timestep, of_frames).sample, out)
            plan.traffic.reset()
            model(clip, timestep, text)
    return out, 2


def attention(case: GoldenCase, plan: FramePlan, tensors: Tensors) -> tuple[Tensor, int]:
    if case.kind == "temporal_attention_clean":
        mechanism, _, heads, head_dim = clean_mechanism(case.config)
        context = Context()
    else:
        _, _, heads, head_dim, _, _, _, plugins, timestep, _, _ = take(
            case.config,
            *("kind", "dim", "heads", "dim_head", "weight_seed", "input_seed", "gain", "plugin_configs", "timestep"),
            *("Ws", "x"),
        )
        (plugin,) = take(plugins, "attn")
        mechanism, context = official_mechanism(plugin, plan.ranks), Context(timestep=timestep)
    return project_out(tensors, attend(mechanism, plan, tensors, heads, head_dim, context)), 1


def attend(
    mechanism: DualScopeAttention, plan: FramePlan, tensors: Tensors, heads: int, head_dim: int, context: Context
) -> Tensor:
    q, k, v = (clip_of(x, plan, 2) for x in project(tensors, heads, head_dim))
    clips = ClipAttention(mechanism=mechanism, plan=plan)
    return clips.attend(q, k, v, TokenGrid(1, 1, frames=plan.length), context=context)


RUNNERS = {
    "group_norm": group_norm,
    "temporal_conv": conv_layer,
    "temporal_conv_exact": conv_layer,
    "temporal_conv_clean": conv_layer,
    "temporal_transformer": transformer,
    "unet": unet,
    "temporal_attention": attention,
    "temporal_attention_clean": attention,
}


@torch.no_grad()
def run(mesh: DeviceMesh, case: GoldenCase, lengths: list[int]) -> tuple[Tensor, int]:
    plan = plan_of(mesh, lengths)
    out, dim = RUNNERS[str(case.kind)](case, plan, case.tensors())
    check_traffic(case, plan)
    return out, dim


def wanted(case: GoldenCase) -> list[tuple[list[int], str]]:
    """Every split to run, and the tensor it gives."""
    if "shard_lengths_to_test" in case.spec:
        return [(lengths, "out.any_world_size") for lengths in case.spec["shard_lengths_to_test"]]
    frames, worlds = case.config["x"][case.spec["frame_dim"]], case.config["Ws"]
    assert {f"out.w{world}" for world in worlds} == {name for name in case.tensors() if name.startswith("out.")}
    return [([frames // world] * world, f"out.w{world}") for world in worlds]


@pytest.mark.dist
@pytest.mark.golden
@pytest.mark.parametrize("case", golden_cases("video_infinity"))
def test_golden(case: GoldenCase) -> None:
    assert case.kind in RUNNERS, f"no runner for the kind {case.kind!r}; there are {', '.join(RUNNERS)}"
    tensors = case.tensors()
    for lengths, name in wanted(case):
        parts = on_ranks(len(lengths), run, case, lengths)
        dim = parts[0][1]
        assert dim == case.spec["frame_dim"]
        out = torch.cat([part for part, _ in parts], dim)
        assert_golden(f"{name} in clips of {lengths} frames", out, tensors[name], case.tolerance)
        if case.spec.get("world_size_invariant") and "vanilla.full" in tensors and "attn" not in str(case.config):
            assert_golden("vanilla", out, tensors["vanilla.full"], case.tolerance)
