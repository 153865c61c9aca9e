"""STAR's LIEMs, blocks, networks and names of weights against recorded numbers."""

import contextlib
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffattn.pipelines.video_sr.i2vgenxl.checkpoint.convert import load_networks, official_places
from diffattn.pipelines.video_sr.i2vgenxl.checkpoint.names import official_names
from diffattn.pipelines.video_sr.i2vgenxl.guidance import guide
from diffattn.pipelines.video_sr.i2vgenxl.networks.components import STARSizes, build_networks
from diffattn.pipelines.video_sr.i2vgenxl.networks.unet import DOWNSAMPLE_PADDING, CroppedUpsample
from diffattn.pipelines.video_sr.i2vgenxl.scheduler import STARScheduler
from diffattn.pipelines.video_sr.liem import LIEMSpatial, LIEMTemporal, add_liem, add_spatial, add_temporal
from diffusers import Transformer2DModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D, TemporalConvLayer
from diffusers.models.transformers.transformer_temporal import TransformerTemporalModel
from diffusers.models.upsampling import Upsample2D
from golden_record import Record
from golden_star import star_cases
from golden_vectors import GoldenCase, assert_golden, run_golden, with_a_key_more, write_case
from torch import Tensor, nn

Tensors = dict[str, Tensor]
Spec = Mapping[str, Any]


@pytest.mark.golden
@pytest.mark.parametrize("case", star_cases("networks"))
@torch.no_grad()
def test_networks(case: GoldenCase) -> None:
    check_of(case)(case)


def test_what_no_test_knows_fails(tmp_path: Path) -> None:
    (tmp_path / "liem_motion.json").write_text(json.dumps({"tensors": {"a": {}}, "config": {}}))
    with pytest.raises(AssertionError, match="a file that no test knows: .*liem_motion"):
        check_of(GoldenCase(tmp_path / "liem_motion.json"))
    with pytest.raises(AssertionError, match="a case that no test knows: {'id': 'gaze'}"):
        block_output({"id": "gaze"}, {"x": torch.zeros(1)}, {"gaze.weight": torch.zeros(1)})


def test_a_key_that_is_not_used_fails(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"\['cases.5.surprise'\]"):
        run_golden(test_networks, with_a_key_more("star", "liem_blocks", tmp_path, "cases", 5))


def test_other_sizes(tmp_path: Path) -> None:
    """LIEMs worked out in float64: maximum and mean of the channels, weighed, through a sigmoid, times the input."""
    pictures, tokens = torch.randn(3, 5, 9, 4), torch.randn(2, 7, 6)
    spatial, temporal = torch.randn(1, 2, 7, 7), torch.randn(1, 2)
    both = torch.stack([pictures.double().amax(1), pictures.double().mean(1)], 1)
    gate = nn.functional.conv2d(both, spatial.double(), padding=3).sigmoid()
    weighed = temporal[0, 0].double() * tokens.double().amax(-1) + temporal[0, 1].double() * tokens.double().mean(-1)
    tensors = {
        "a/x": pictures,
        "a/conv1.weight": spatial,
        "a/y": (gate * pictures.double()).float(),
        "b/x": tokens,
        "b/conv1.weight": temporal,
        "b/y": (weighed.sigmoid()[..., None] * tokens.double()).float(),
    }
    spec = {"cases": [{"id": "a", "kind": "spatial", "x": "b c h w"}, {"id": "b", "kind": "temporal", "x": "b t c"}]}
    run_golden(test_networks, write_case(tmp_path / "star", "liem_own", spec, tensors))


def check_of(case: GoldenCase) -> Callable[[GoldenCase], None]:
    """By what a file holds, whatever its name is."""
    spec = case.spec
    if "cases" in spec:
        return check_blocks
    if "cls" in spec and "state_dict" in spec:
        return check_names
    if "state_dict" in spec and any(name.startswith("out/") for name in spec.get("tensors", ())):
        return check_denoising
    raise AssertionError(f"a file that no test knows: {case.path}")


# ---- blocks


def check_blocks(case: GoldenCase) -> None:
    tensors, cases = case.tensors(), case.spec["cases"]
    assert cases
    assert {name.partition("/")[0] for name in tensors} == {spec["id"] for spec in cases}
    for spec in cases:
        spec.told("x")  # names of the axes
        given = tensors.under(f"{spec['id']}/")
        weights = {k.removeprefix("w/"): tensor for k, tensor in given.items() if k.startswith("w/")}
        assert_golden(spec["id"], block_output(spec, given, weights), given["y"], case.tolerance)


def block_output(spec: Spec, given: Tensors, weights: Tensors) -> Tensor:
    """Told apart by the names of the weights, whatever the case's id is."""
    temporal = any("local2." in key for key in weights)
    if "conv1.weight" in given:
        return liem_output(spec, given)
    if "temopral_conv.conv1.0.weight" in weights:
        return resblock_output(spec, given, weights)
    if "op.weight" in weights:
        return down_output(spec, given, weights)
    if "conv.weight" in weights:
        return up_output(spec, given, weights)
    if "proj_in.weight" in weights:
        return (temporal_transformer_output if temporal else spatial_transformer_output)(spec, given, weights)
    if "attn1.to_q.weight" in weights:
        return (temporal_block_output if temporal else spatial_block_output)(spec, given, weights)
    raise AssertionError(f"a case that no test knows: {spec}")


def liem_output(spec: Spec, given: Tensors) -> Tensor:
    weight = given["conv1.weight"]
    made = {"spatial": lambda: LIEMSpatial(weight.shape[-1]), "temporal": LIEMTemporal}[spec["kind"]]()
    return loaded(made, {"conv1.weight": weight})(given["x"])


def loaded(module: Any, weights: Tensors) -> Any:
    module.load_state_dict(weights)
    return module.eval()


def block(spec: Spec, weights: Tensors, **options: Any) -> BasicTransformerBlock:
    return BasicTransformerBlock(weights["norm1.weight"].numel(), spec["heads"], spec["dim_head"], **options)


def spatial_block_output(spec: Spec, given: Tensors, weights: Tensors) -> Tensor:
    made = block(spec, weights, cross_attention_dim=given["context"].shape[-1])
    add_spatial(made).grid = (spec["h"], spec["w"])
    return loaded(made, weights)(given["x"], encoder_hidden_states=given["context"])


def temporal_block_output(spec: Spec, given: Tensors, weights: Tensors) -> Tensor:
    made = block(spec, weights, double_self_attention=True)
    add_temporal(made)
    return loaded(made, weights)(given["x"])


def spatial_transformer_output(spec: Spec, given: Tensors, weights: Tensors) -> Tensor:
    made = Transformer2DModel(
        spec["heads"],
        spec["dim_head"],
        in_channels=given["x"].shape[1],
        cross_attention_dim=given["context"].shape[-1],
        use_linear_projection=True,
    )
    add_liem(made)
    return loaded(made, weights)(given["x"], encoder_hidden_states=given["context"], return_dict=False)[0]


def temporal_transformer_output(spec: Spec, given: Tensors, weights: Tensors) -> Tensor:
    """(b, c, frames, rows, columns) there, frames in the batch here."""
    x = given["x"]
    made = TransformerTemporalModel(spec["heads"], spec["dim_head"], in_channels=x.shape[1])
    add_liem(made)
    flat = {key: t.squeeze(-1) if key.startswith("proj_") and t.ndim == 3 else t for key, t in weights.items()}
    y = loaded(made, flat)(x.transpose(1, 2).flatten(0, 1), num_frames=x.shape[2], return_dict=False)[0]
    return y.unflatten(0, (x.shape[0], x.shape[2])).transpose(1, 2)


def resblock_output(spec: Spec, given: Tensors, weights: Tensors) -> Tensor:
    """The stock pair of a residual block and a temporal convolution, under the names of a network's first layer."""
    out, into = weights["in_layers.2.weight"].shape[:2]
    made = nn.ModuleDict(
        {
            "resnets": nn.ModuleList([ResnetBlock2D(in_channels=into, out_channels=out, **resnet_options(given))]),
            "temp_convs": nn.ModuleList([TemporalConvLayer(out, out, dropout=0.1, norm_num_groups=32)]),
        }
    )
    names = official_names([f"down_blocks.0.{key}" for key in made.state_dict()])
    own = {
        key.removeprefix("down_blocks.0."): weights[official.removeprefix("input_blocks.1.0.")]
        for key, official in names.items()
    }
    assert len(own) == len(weights)
    loaded(made, own)
    hidden = made["resnets"][0](given["x"], given["emb"])
    frames = given["x"].shape[0] // spec["batch_size"]
    assert frames == spec.get("frames", frames)
    return made["temp_convs"][0](hidden, num_frames=frames)


def resnet_options(given: Tensors) -> dict[str, Any]:
    return {"temb_channels": given["emb"].shape[-1], "groups": 32, "eps": 1e-5}


def down_output(spec: Spec, given: Tensors, weights: Tensors) -> Tensor:
    assert tuple(spec["padding"]) == DOWNSAMPLE_PADDING and spec["stride"] == 2
    made = Downsample2D(given["x"].shape[1], use_conv=True, padding=DOWNSAMPLE_PADDING, name="op")
    return loaded(made, {key.replace("op.", "conv."): tensor for key, tensor in weights.items()})(given["x"])


def up_output(spec: Spec, given: Tensors, weights: Tensors) -> Tensor:
    assert spec["crop_rows"] == [1, -1]
    made = loaded(CroppedUpsample(Upsample2D(given["x"].shape[1], use_conv=True)), weights)
    y = made(given["x"])
    assert torch.equal(made(given["x"], output_size=(3, 5)), y)
    return y


# ---- whole networks


def sizes_of(config: Record) -> STARSizes:
    """Sizes of the official configuration; the scale of the b-th level is 1 / 2^b."""
    levels, channels = config["dim_mult"], config.get("in_dim", 4)
    config.told("dropout", "use_checkpoint")  # of training
    assert (
        config.get("out_dim", channels) == channels
        and config.get("y_dim", config["context_dim"]) == config["context_dim"]
    )
    return STARSizes(
        channels=tuple(config["dim"] * factor for factor in levels),
        attention=tuple(0.5**b in config["attn_scales"] for b in range(len(levels))),
        layers=config["num_res_blocks"],
        head_width=config["head_dim"],
        first_heads=config["num_heads"],
        text_width=config["context_dim"],
        latent_channels=channels,
    )


def check_names(case: GoldenCase) -> None:
    """Every weight of the full size has a place of its own, of its shape."""
    spec = case.spec
    want = {name: tuple(shape) for name, shape in spec["state_dict"].plain().items()}
    with torch.device("meta"):
        networks = build_networks(sizes_of(spec["config"]))
    places = official_places(networks)
    assert {name: place.shape for name, place in places.items()} == want
    assert len({(place.network, place.key) for place in places.values()}) == len(want) == spec["num_keys"]
    counts = {name: sum(p.numel() for p in network.parameters()) for name, network in networks.items()}
    assert sum(counts.values()) == spec["num_params"] and counts["controlnet"] == spec["num_params_controlnet"]
    gates = [math.prod(shape) for name, shape in want.items() if ".local" in name]
    assert sum(gates) == spec["num_params_liem"]


def check_denoising(case: GoldenCase) -> None:
    """Both networks in every recorded activation, and one guided prediction."""
    tensors = case.tensors()
    given = {part: {} for part in ("in", "out", "act", "w")}
    for name, tensor in tensors.items():
        part, _, rest = name.partition("/")
        given[part][rest] = tensor
    weights = {name: tensor.float() for name, tensor in given["w"].items()}
    assert {name: list(tensor.shape) for name, tensor in weights.items()} == case.spec["state_dict"]
    networks = load_networks(weights, case.path, sizes_of(case.config))
    assert sum(p.numel() for network in networks.values() for p in network.parameters()) == case.spec["params"]
    results = denoise(case.spec, networks, given["in"], given["act"], case.tolerance)
    assert results.keys() == given["out"].keys()
    for name, tensor in given["out"].items():
        assert_golden(name, results[name], tensor, case.tolerance)


def denoise(
    spec: Spec, networks: dict[str, Any], given: Tensors, activations: Tensors, tolerance: dict[str, Any]
) -> Tensors:
    x, t, unet = given["x"], given["t"], networks["unet"]
    results: Tensors = {}
    for name, text in (("v_uncond", given["y_neg"]), ("v_cond", given["y"])):
        down, mid = networks["controlnet"](x, t, text, given["hint"], return_dict=False)
        residuals = {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}
        with recorded(networks, activations) as found:  # of the last call, with the text
            results[name] = unet(x, t, text, **residuals).sample
    for name, tensor in activations.items():
        got = found[name]
        if tensor.ndim == 5:  # of a temporal transformer, which has no frames in the batch there
            got = got.unflatten(0, (len(x), -1)).transpose(1, 2)
        assert_golden(name, got, tensor, tolerance)
    results.update({f"control.{k}": residual for k, residual in enumerate((*down, mid))})
    guided = guide(results["v_cond"], results["v_uncond"], spec["guide_scale"], spec["guide_rescale"])
    results["x0_cfg"], results["eps_cfg"], results["mu_cfg"] = posterior(x, guided, t)
    results["x0_guide1"], *_ = posterior(x, results["v_cond"], t)
    return results


def posterior(x: Tensor, v: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x_0, the noise in x_t, and the mean of q(x_(t-1) | x_t, x_0)."""
    scheduler = STARScheduler()
    times = t.expand(len(x)).tolist()
    x0 = torch.cat([scheduler.x0_at(x[i : i + 1], v[i : i + 1], time) for i, time in enumerate(times)])
    tables = scheduler.alpha_t, scheduler.sigma_t
    a, s = (table[times].view(-1, 1, 1, 1, 1) for table in tables)
    a_before, s_before = (table[[time - 1 for time in times]].view(-1, 1, 1, 1, 1) for table in tables)
    step = a / a_before
    mean = (step * s_before**2 * x + a_before * (1 - step**2) * x0) / s**2
    return x0, (x - a * x0) / s, mean


@contextlib.contextmanager
def recorded(networks: dict[str, Any], names: Iterable[str]) -> Iterator[Tensors]:
    """Outputs of the official modules `unet.<name>`, filled by each forward."""
    found: Tensors = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            found[name] = output[0] if isinstance(output, tuple) else output

        return hook

    hooks = [module_of(networks, name).register_forward_hook(keep(name)) for name in names]
    yield found
    for hook in hooks:
        hook.remove()


RUN = ("conv_in", "transformer_in", "resnets", "temp_convs", "attentions", "temp_attentions", "downsamplers")
"""The order in which the parts of a block run; upsamplers come last."""


def module_of(networks: dict[str, Any], name: str) -> nn.Module:
    """The module that ends an official one: `unet.middle_block.last`, `unet.output_blocks.1.upsample`, ..."""
    which, _, name = name.partition(".")
    network = networks[which]
    if name == "middle_block.last":
        return network.mid_block
    stem = name.removesuffix(".upsample")
    inside = [
        key
        for key, official in official_names(network.state_dict(), network.config.layers_per_block).items()
        if official.startswith(f"{stem}.") and (stem == name or ".upsamplers." in key)
    ]

    def rank(key: str) -> int:
        return next((i for i, part in enumerate(RUN) if f".{part}." in f".{key}"), len(RUN))

    path = re.match(r"(down|up)_blocks\.\d+\.\w+\.\d+|mid_block\.\w+\.\d+|\w+", max(inside, key=rank))
    assert path is not None
    return network.get_submodule(path[0])
