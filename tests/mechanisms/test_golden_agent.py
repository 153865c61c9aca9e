"""Agent attention against numbers recorded from the official implementation."""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_record import Record
from golden_vectors import GoldenCase, assert_golden, golden_cases, run_golden, with_a_key_more, write_case
from torch import Tensor
from torch.nn import functional as F

from diffattn.grid import TokenGrid
from diffattn.mechanisms.agent import AgentAttention, agent_attention, worthwhile
from diffattn.mechanisms.base import Context, default_scale
from diffattn.mechanisms.parts.agent_weights import BIAS_SIZE, AgentWeights
from diffattn.mechanisms.parts.merging import Merging, count_merged, destinations, match

Tensors = Mapping[str, Tensor]


def to_heads(tokens: Tensor, heads: int) -> Tensor:
    return tokens.unflatten(-1, (heads, -1)).transpose(1, 2)  # b h n d


def from_heads(tokens: Tensor) -> Tensor:
    return tokens.transpose(1, 2).flatten(2)  # b n c


def linear(tensors: Tensors, name: str, tokens: Tensor) -> Tensor:
    return F.linear(tokens, tensors[f"{name}.weight"], tensors.get(f"{name}.bias"))


def layer_norm(tensors: Tensors, name: str, tokens: Tensor, eps: float) -> Tensor:
    weight, bias = tensors[f"{name}.weight"], tensors[f"{name}.bias"]
    return F.layer_norm(tokens, weight.shape, weight, bias, eps)


def project(tensors: Tensors, name: str, query: Tensor, key: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    pairs = (("to_q", query), ("to_k", key), ("to_v", key))
    q, k, v = (to_heads(linear(tensors, f"{name}.{layer}", tokens), heads) for layer, tokens in pairs)
    return q, k, v


def check_precision(precision: str | None) -> None:
    # "fp32" computes the logits in float32, which float32 inputs do anyway
    assert precision in (None, "fp32"), f"attn_precision {precision!r} is not handled"


def run_attention(case: GoldenCase, tensors: Record) -> None:
    """Without agents, or with too many of them, the released code attends plainly."""
    config = case.config
    n, heads, agents, used = config["tokens"], config["heads"], config["agents"], config["agent_path_used"]
    check_precision(config["attn_precision"])
    assert tensors["x"].shape == (config["batch"], n, heads * config["head_dim"])
    assert used == (agents is not None and worthwhile(agents, n))
    q, k, v = project(tensors, "attn", tensors["x"], tensors["x"], heads)
    scale = default_scale(q)
    scales = {"scale": scale, "scale2": scale ** config["k_scale2"], "shortcut": config["k_shortcut"]}
    if agents is not None:
        assert tensors["agent"].shape[1] == agents
    if used:
        queries = to_heads(linear(tensors, "attn.to_q", tensors["agent"]), heads)
        out = agent_attention(q, k, v, queries, TokenGrid(1, n), **scales)
    else:
        out = F.scaled_dot_product_attention(q, k, v)
    assert_golden("output", linear(tensors, "attn.to_out.0", from_heads(out)), tensors["output"], case.tolerance)


def check_merging(name: str, merging: Merging, ours: tuple[Tensor, Tensor], tensors: Tensors) -> None:
    """The same tokens merged into the same ones, in the same order, whatever the order of the sets themselves."""
    prefix = "agent_" if name == "agents" else ""
    src, dst = ours
    their_src, their_dst = tensors["src_index"], tensors["dst_index"]
    torch.testing.assert_close(src[merging.kept], their_src[tensors[f"{prefix}kept_src"]], msg=f"{name}: kept tokens")
    merged, into = their_src[tensors[f"{prefix}merged_src"]], their_dst[tensors[f"{prefix}merged_into"]]
    torch.testing.assert_close(src[merging.merged], merged, msg=f"{name}: merged tokens")
    torch.testing.assert_close(dst[merging.into], into, msg=f"{name}: destinations")


def in_their_order(tokens: Tensor, dst: Tensor, their_dst: Tensor) -> Tensor:
    """Merged tokens with the destinations, which end the sequence, in the order of the recorded set."""
    kept = tokens.shape[-2] - len(dst)
    order = torch.cat([torch.arange(kept), kept + torch.searchsorted(dst, their_dst)])
    return tokens[..., order, :]


def run_merge(case: GoldenCase, tensors: Record) -> None:
    config, tolerance = case.config, case.tolerance
    grid, sx, sy = TokenGrid(config["height"], config["width"]), config["sx"], config["sy"]
    assert len(tensors["metric"]) == config["batch"]
    assert [int(grid.cells * config[share]) for share in ("ratio", "agent_ratio")] == [config["r"], config["agent_r"]]
    count, agent_count = (count_merged(grid, sx, sy, config[share]) for share in ("ratio", "agent_ratio"))
    assert (count, agent_count) == (config["effective_r"], config["effective_agent_r"])

    seed = config["generator_seed"]
    generator = torch.Generator().manual_seed(seed) if config["random"] else None
    dst = destinations(grid, sx, sy, generator)
    assert torch.equal(dst, tensors["dst_index"].sort().values)
    pairs = match(tensors["metric"], dst)
    assert torch.equal(pairs.src, tensors["src_index"].sort().values)
    merging = pairs.first(count)
    check_merging("tokens", merging, (pairs.src, pairs.dst), tensors)
    merged = merging.merge(tensors["values"])
    assert merged.shape[1] == config["num_features"]
    assert_golden("merged", in_their_order(merged, dst, tensors["dst_index"]), tensors["merged"], tolerance)
    assert_golden("unmerged", merging.unmerge(merged), tensors["unmerged"], tolerance)

    agents = config["num_agents"]
    assert worthwhile(grid.cells - agent_count, config["num_features"]) == (agents is not None)
    if agents is None:
        assert "agents" not in tensors
        return
    agent_merging = pairs.first(agent_count)
    check_merging("agents", agent_merging, (pairs.src, pairs.dst), tensors)
    made = agent_merging.merge(tensors["values"])
    assert made.shape[1] == agents
    assert_golden("agents", in_their_order(made, dst, tensors["dst_index"]), tensors["agents"], tolerance)


class Recorded(AgentAttention):
    """Draws from one generator forked from the global state at first use, as the official model-wide state does."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        object.__setattr__(self, "drawn", [])
        object.__setattr__(self, "forked", [])

    def generator(self, context: Context) -> torch.Generator:
        self.forked or self.forked.append(super().generator(context))
        return self.forked[0]

    def destinations(self, grid: TokenGrid, batch: int, context: Context) -> Tensor:
        self.drawn.append(super().destinations(grid, batch, context))
        return self.drawn[-1]


def run_block(
    tensors: Tensors, name: str, x: Tensor, config: Record, attend: Callable[..., Tensor], context: Tensor
) -> Tensor:
    """An LDM transformer block on `(b, n, c)`; `attend(q, k, v, features)` is its self-attention."""
    heads, eps = config["heads"], config["ln_eps"]
    normed = layer_norm(tensors, f"{name}norm1", x, eps)
    out = attend(*project(tensors, f"{name}attn1", normed, normed, heads), x)
    x = x + linear(tensors, f"{name}attn1.to_out.0", from_heads(out))
    normed = layer_norm(tensors, f"{name}norm2", x, eps)
    out = F.scaled_dot_product_attention(*project(tensors, f"{name}attn2", normed, context, heads))
    x = x + linear(tensors, f"{name}attn2.to_out.0", from_heads(out))
    normed = layer_norm(tensors, f"{name}norm3", x, eps)
    hidden, gate = linear(tensors, f"{name}ff.net.0.proj", normed).chunk(2, dim=-1)
    return x + linear(tensors, f"{name}ff.net.2", hidden * F.gelu(gate))


def make_mechanism(patch: Record) -> AgentAttention:
    check_precision(patch["attn_precision"])
    merges = [patch[name] for name in ("merge_attn", "merge_crossattn", "merge_mlp")]
    assert merges == [True, False, False], f"merging elsewhere than in self-attention is not handled: {merges}"
    options = ("ratio", "agent_ratio", "sx", "sy", "max_downsample", "k_scale2", "k_shortcut", "use_rand")
    return Recorded(agents="merge", official=True, **{name: patch[name] for name in options})


def run_network(case: GoldenCase, tensors: Record, mechanism: AgentAttention, progress: float | None = None) -> Tensor:
    """The block, or the two blocks, with `mechanism` as their self-attention."""
    config, x, text = case.config, tensors["x"], tensors["context"]
    height, width = config["height"], config["width"]

    def block(name: str, x: Tensor, height: int, width: int) -> Tensor:
        downsample = math.ceil(math.sqrt(config["height"] * config["width"] // (height * width)))

        def attend(q: Tensor, k: Tensor, v: Tensor, features: Tensor) -> Tensor:
            context = Context(features=features, downsample=downsample, progress=progress)
            return mechanism.attend(q, k, v, TokenGrid(height, width), context=context)

        return run_block(tensors, name, x, config, attend, text)

    def on_picture(name: str, picture: Tensor) -> Tensor:
        tokens = block(name, picture.flatten(2).transpose(1, 2), *picture.shape[-2:])
        return tokens.transpose(1, 2).unflatten(-1, picture.shape[-2:])

    torch.manual_seed(config["torch_seed_before_forward"])
    if case.kind == "block":
        (name,) = (key.removesuffix("norm1.weight") for key in tensors if key.endswith("norm1.weight"))
        return block(name, x, height, width)
    fine = on_picture("net.b0.", x)
    coarse = on_picture("net.b1.", F.avg_pool2d(fine, 2))
    return fine + F.interpolate(coarse, scale_factor=2, mode="nearest")


def run_net(case: GoldenCase, tensors: Record) -> None:
    config = case.config
    config.told("stage", "blocks")  # words: when the released schedule has these options, and what a net is
    (block,) = {key.removesuffix("norm1.weight") for key in tensors if key.endswith("norm1.weight")} - {"net.b1."}
    width = config["heads"] * config["head_dim"]
    assert tensors[f"{block}attn1.to_q.weight"].shape == (width, width)
    assert tensors[f"{block}ff.net.2.weight"].shape == (width, config["ff_mult"] * width)
    assert tensors["context"].shape[-1] == config["context_dim"]
    assert len(tensors["x"]) == config["batch"]

    mechanism: Any = make_mechanism(case.config["patch_args"])
    output = run_network(case, tensors, mechanism)
    recorded = [tensors[name] for name in sorted(tensors) if name.startswith("dst_index")]
    if recorded or case.kind == "net":
        assert len(mechanism.drawn) == len(recorded)
    for drawn, want in zip(mechanism.drawn, recorded, strict=bool(recorded)):
        assert torch.equal(drawn, want.sort().values)
    assert_golden("output", output, tensors["output"], case.tolerance)

    # the published schedule is this stage at the right progress
    preset = replace(AgentAttention.stable_diffusion(), official=True)
    options = ("sx", "sy", "ratio", "agent_ratio")
    same = [stage for stage in preset.stages if all(getattr(stage, key) == getattr(mechanism, key) for key in options)]
    shared = ("k_scale2", "k_shortcut", "max_downsample", "use_rand")
    if same and len(recorded) == 1 and all(getattr(preset, key) == getattr(mechanism, key) for key in shared):
        progress = same[0].until - 0.01
        assert_golden("preset", run_network(case, tensors, preset, progress), tensors["output"], case.tolerance)


def run_trained(case: GoldenCase, tensors: Record) -> None:
    dim, heads, agent_num, window = (case.config[name] for name in ("dim", "heads", "agent_num", "window"))
    assert tensors["x"].shape == (case.config["batch"], 1 + window**2, dim)
    side = math.isqrt(agent_num)
    assert side**2 == agent_num
    mechanism = AgentAttention.published((side, side), window)
    weights = mechanism.weights(heads, dim // heads)
    assert isinstance(weights, AgentWeights)
    own = {name: tensor for name, tensor in tensors.under("attn.").items() if not name.startswith(("qkv.", "proj."))}
    assert own["an_bias"].shape[-1] == BIAS_SIZE
    weights.load_state_dict(own, strict=True)
    q, k, v = (to_heads(tokens, heads) for tokens in linear(tensors, "attn.qkv", tensors["x"]).chunk(3, dim=-1))
    with torch.no_grad():
        out = mechanism.attend(q, k, v, TokenGrid(window, window, before=1), context=Context(weights=weights))
    assert_golden("output", linear(tensors, "attn.proj", from_heads(out)), tensors["output"], case.tolerance)


RUNNERS = {
    "attention": run_attention,
    "merge": run_merge,
    "block": run_net,
    "net": run_net,
    "deit_agent_attention": run_trained,
}


@pytest.mark.golden
@pytest.mark.parametrize("case", golden_cases("agent"))
def test_golden(case: GoldenCase) -> None:
    assert case.kind in RUNNERS, f"no runner for the kind {case.kind!r}; there are {', '.join(RUNNERS)}"
    RUNNERS[case.kind](case, case.tensors())


# ---- cases of our own


@pytest.mark.parametrize("inside", [(), ("patch_args",)])
def test_a_key_that_is_not_used_fails(tmp_path: Path, inside: tuple[str, ...]) -> None:
    name = "net_8x8_early_b1" if inside else "attn_n40_none_h2"
    with pytest.raises(AssertionError, match=rf"\['{'.'.join(['config', *inside, 'surprise'])}'\]"):
        run_golden(test_golden, with_a_key_more("agent", name, tmp_path, *inside))


@pytest.mark.parametrize("agents", [None, 5, 11])
def test_other_sizes(tmp_path: Path, agents: int | None) -> None:
    """A layer worked out in float64: without agents, with few enough, and with too many for 21 tokens."""
    used = agents == 5
    config = {"kind": "attention", "tokens": 21, "agents": agents, "heads": 3, "head_dim": 4, "k_scale2": 0.7,
              "k_shortcut": 0.2, "attn_precision": "fp32", "batch": 2, "agent_path_used": used}  # fmt: skip
    x = torch.randn(2, 21, 12)
    tensors = {"x": x} | ({} if agents is None else {"agent": torch.randn(2, agents, 12)})
    tensors |= {f"attn.to_{name}.weight": torch.randn(12, 12) * 0.4 for name in "qkv"}
    tensors |= {"attn.to_out.0.weight": torch.randn(12, 12), "attn.to_out.0.bias": torch.randn(12)}
    double = {name: tensor.double() for name, tensor in tensors.items()}
    q, k, v = project(double, "attn", double["x"], double["x"], 3)
    out = (q @ k.mT / 2).softmax(-1) @ v
    if used:
        a = to_heads(linear(double, "attn.to_q", double["agent"]), 3)
        out = (4**-0.35 * q @ a.mT).softmax(-1) @ ((a @ k.mT / 2).softmax(-1) @ v) + 0.2 * v
    tensors["output"] = linear(double, "attn.to_out.0", from_heads(out)).float()
    run_golden(test_golden, write_case(tmp_path / "agent", "own", {"config": config}, tensors))
