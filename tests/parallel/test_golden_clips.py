"""Clips on real ranks against numbers recorded from the official implementation, and the traffic against its own.

The cases `*_clean` are not official: they hold for every split.
"""

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from clip_splits import clip_of, plan_of
from diffusers import UNet3DConditionModel
from diffusers.models.resnet import TemporalConvLayer
from diffusers.models.transformers.transformer_temporal import TransformerTemporalModel
from golden_clips import RECORDING, clean_mechanism, official_mechanism, project_out, projected
from golden_record import Path as Asked
from golden_record import Record
from golden_vectors import GoldenCase, assert_golden, golden_cases, run_golden, with_a_key_more, write_case
from parallel_ranks import on_ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn import functional

from diffattn.grid import TokenGrid
from diffattn.mechanisms.base import Context
from diffattn.parallel.attention import ClipAttention
from diffattn.parallel.frames import apply_on_clips
from diffattn.parallel.hooks import PaddedConvLayer, attach
from diffattn.parallel.operations.conv import LAYER_HALO
from diffattn.parallel.operations.group_norm import distributed_group_norm
from diffattn.parallel.operations.shares import FramePlan
from diffattn.parallel.video_models.unet3d import attach_unet3d


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


def load(module: nn.Module, tensors: Record) -> nn.Module:
    module.load_state_dict(tensors.under("weights."))
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


def group_norm(case: GoldenCase, plan: FramePlan, tensors: Record) -> tuple[Tensor, int]:
    x, config = tensors["in.x"], case.config
    config.told("plugin_configs")  # a norm has no options
    assert x.shape[1] == config["channels"]
    weight, bias = tensors["weights.weight"], tensors["weights.bias"]
    return distributed_group_norm(clip_of(x, plan, 2), config["groups"], weight, bias, config["eps"], plan), 2


def conv_layer(case: GoldenCase, plan: FramePlan, tensors: Record) -> tuple[Tensor, int]:
    config, mode = case.config, MODES[str(case.kind)]
    module = load(TemporalConvLayer(config["channels"], norm_num_groups=config["groups"]), tensors)
    plugins = config.get("plugin_configs") or Record({})
    plugins.told("attn")  # a convolution attends to nothing
    layer, (plugin, options) = Layer(temp_conv=module), conv_plugin(plugins, mode)
    with ExitStack() as stack:
        if plugin == "conv_layer":
            attach(stack, module, PaddedConvLayer(plan, **options))
        else:
            attach_unet3d(layer, plan, "clean", stack)
        return layer(clip_of(tensors["in.x"], plan, 1), 0), 1


MODES = {"temporal_conv": "default", "temporal_conv_exact": "exact", "temporal_conv_clean": "exact"}


def conv_plugin(plugins: Record, mode: str) -> tuple[str, dict[str, int]]:
    """The plugin of temporal convolutions that a mode mounts, and its options; the other one may be named, unmounted.

    `conv_layer` pads a whole layer, by 4 frames unless told otherwise. `conv_3d` pads every convolution: by the frame
    that its kernel reaches, for more is cut off again.
    """
    mounted, other = ("conv_layer", "conv_3d") if mode == "default" else ("conv_3d", "conv_layer")
    plugins.told(other, "group_norm")  # which has no options
    options = plugins.get(mounted, Record({}))
    if mounted == "conv_3d":
        assert options.get("padding", 1) >= 1, "a convolution that misses frames: another rule"
        return mounted, {}
    return mounted, {"halo": options["padding"]} if "padding" in options else {}


def transformer(case: GoldenCase, plan: FramePlan, tensors: Record) -> tuple[Tensor, int]:
    config = case.config
    module = TransformerTemporalModel(
        config["heads"], config["dim_head"], in_channels=config["channels"], norm_num_groups=config["groups"]
    )
    layer = Layer(transformer_in=load(module, tensors))
    plugins = config["plugin_configs"]
    plugins.told("conv_layer", "conv_3d", "group_norm")  # a temporal transformer has no convolution
    mechanism = official_mechanism(plugins["attn"], plan.ranks)
    with apply_on_clips(layer, plan, mechanism, mode="clean" if config["distribute_group_norm"] else "official"):
        return layer(clip_of(tensors["in.x"], plan, 1), torch.tensor(config["timestep"])), 1


def unet(case: GoldenCase, plan: FramePlan, tensors: Record) -> tuple[Tensor, int]:
    config = case.config
    mode, prompts, timestep = config["mode"], config["ehs"], config["timestep"]
    assert mode in ("default", "exact") and prompts in ("shared", "per_rank")
    _, options = conv_plugin(config["plugin_configs"], mode)
    assert options in ({}, {"halo": LAYER_HALO}), f"the released U-Net pads its convolutions by {LAYER_HALO}: {options}"
    text = tensors["in.encoder_hidden_states"]
    if prompts == "per_rank":
        assert len(text) == plan.ranks
        of_frames = torch.cat(
            [part[:, None].expand(-1, n, -1, -1) for part, n in zip(text, plan.lengths, strict=True)], 1
        )
        text = text[plan.rank]
    model = load(UNet3DConditionModel(**config["unet_config"].plain()), tensors)
    clip = clip_of(tensors["in.x"], plan, 2)
    mechanism = official_mechanism(config["plugin_configs"]["attn"], plan.ranks)
    with apply_on_clips(model, plan, mechanism, mode="official" if mode == "default" else "clean"):
        out = model(clip, timestep, text).sample
        check_traffic(case, plan)
        if prompts == "per_rank":  # the same by a prompt for each frame
            assert torch.equal(model(clip, timestep, of_frames).sample, out)
            plan.traffic.reset()
            model(clip, timestep, text)
    return out, 2


def attention(case: GoldenCase, plan: FramePlan, tensors: Record) -> tuple[Tensor, int]:
    config = case.config
    if case.kind == "temporal_attention_clean":
        mechanism, context = clean_mechanism(config), Context()
    else:
        mechanism = official_mechanism(config["plugin_configs"]["attn"], plan.ranks)
        context = Context(timestep=config["timestep"])
    q, k, v = (clip_of(x, plan, 2) for x in projected(config, tensors))
    clips = ClipAttention(mechanism=mechanism, plan=plan)
    out = clips.attend(q, k, v, TokenGrid(1, 1, frames=plan.length), context=context)
    return project_out(tensors, out), 1


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
def run(mesh: DeviceMesh, case: GoldenCase, lengths: list[int]) -> tuple[Tensor, int, set[Asked]]:
    """This rank's frames, their axis, and what of the case was used."""
    plan = plan_of(mesh, lengths)
    out, dim = RUNNERS[str(case.kind)](case, plan, case.tensors())
    check_traffic(case, plan)
    return out, dim, case.asked


def wanted(case: GoldenCase) -> list[tuple[list[int], str]]:
    """Every split to run, and the tensor it gives."""
    if "shard_lengths_to_test" in case.spec:
        return [(lengths, "out.any_world_size") for lengths in case.spec["shard_lengths_to_test"]]
    shape, worlds = case.config["x"], case.config["Ws"]
    assert list(case.tensors()["in.x"].shape) == shape
    frames = shape[case.spec["frame_dim"]]
    return [([frames // world] * world, f"out.w{world}") for world in worlds]


@pytest.mark.dist
@pytest.mark.golden
@pytest.mark.parametrize("case", golden_cases("video_infinity"))
def test_golden(case: GoldenCase) -> None:
    assert case.kind in RUNNERS, f"no runner for the kind {case.kind!r}; there are {', '.join(RUNNERS)}"
    tensors = case.tensors()
    case.config.told(*RECORDING)
    tensors.told("vanilla.full")  # the whole video without clips: of use where the result is the same
    for lengths, name in wanted(case):
        parts = on_ranks(len(lengths), run, case, lengths)
        dim = parts[0][1]
        assert dim == case.spec["frame_dim"]
        out = torch.cat([part for part, _, _ in parts], dim)
        case.asked.update(*(asked for _, _, asked in parts))
        assert_golden(f"{name} in clips of {lengths} frames", out, tensors[name], case.tolerance)
        if (
            case.spec.get("world_size_invariant")
            and "vanilla.full" in tensors
            and "attn" not in (case.config.get("plugin_configs") or ())
        ):
            assert_golden("vanilla", out, tensors["vanilla.full"], case.tolerance)


# ---- cases of our own


@pytest.mark.dist
@pytest.mark.parametrize("inside", [(), ("plugin_configs", "attn")])
def test_a_key_that_is_not_used_fails(tmp_path: Path, inside: tuple[str, ...]) -> None:
    name = "attn_phase_gap" if inside else "group_norm_a"
    with pytest.raises(AssertionError, match=rf"\['{'.'.join(['config', *inside, 'surprise'])}'\]"):
        run_golden(test_golden, with_a_key_more("video_infinity", name, tmp_path, *inside))


@pytest.mark.dist
@pytest.mark.parametrize("padding", [2, None])
def test_other_sizes(tmp_path: Path, padding: int | None) -> None:
    """A temporal convolution worked out in float64: clips with the frames around them, zeros beyond the video."""
    channels, groups, frames, halo = 6, 3, 10, 4 if padding is None else padding
    config = {"kind": "temporal_conv", "channels": channels, "groups": groups, "weight_seed": 0, "input_seed": 0,
              "Ws": [1, 2], "x": [1, frames, channels, 3, 2],
              "plugin_configs": {"conv_layer": {} if padding is None else {"padding": padding}}}  # fmt: skip
    layer = TemporalConvLayer(channels, norm_num_groups=groups).eval()
    weights = {name: torch.randn_like(tensor) * 0.5 for name, tensor in layer.state_dict().items()}
    x = torch.randn(config["x"])
    tensors = {"in.x": x} | {f"weights.{name}": weight for name, weight in weights.items()}
    for world in config["Ws"]:
        parts = []
        for clip in range(world):
            first, length = clip * frames // world, frames // world
            whole = functional.pad(x.double().transpose(1, 2), (0, 0, 0, 0, halo, halo))[:, :, first:]
            window = convolved(whole[:, :, : length + 2 * halo], weights, groups)
            parts.append(x[:, first : first + length] + window[:, :, halo:-halo].transpose(1, 2))
        tensors[f"out.w{world}"] = torch.cat(parts, 1).float()
    spec = {"config": config, "frame_dim": 1}
    run_golden(test_golden, write_case(tmp_path / "video_infinity", "own", spec, tensors))


def convolved(x: Tensor, weights: Mapping[str, Tensor], groups: int) -> Tensor:
    """Four times group norm, SiLU and a convolution along the frames, which is the last of each `conv<i>`."""
    for i in (1, 2, 3, 4):
        own = {name.split(".", 1)[1]: w.double() for name, w in weights.items() if name.startswith(f"conv{i}.")}
        last = max(own)[0]
        x = functional.silu(functional.group_norm(x, groups, own["0.weight"], own["0.bias"]))
        x = functional.conv3d(x, own[f"{last}.weight"], own[f"{last}.bias"], padding=(1, 0, 0))
    return x
