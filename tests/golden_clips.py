"""What the recorded cases of Video-Infinity have in common: their settings, and the projections of an attention."""

from collections.abc import Mapping

from golden_record import Record
from torch import Tensor
from torch.nn import functional as F

from diffattn.mechanisms.dual_scope import DualScopeAttention
from diffattn.mechanisms.parts.scopes.frames import Phase

Tensors = Mapping[str, Tensor]


RECORDING = ("weight_seed", "input_seed", "gain")
"""What weights and inputs were drawn by; they are recorded themselves."""


def project(tensors: Tensors, heads: int, head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    def part(name: str) -> Tensor:
        out = F.linear(tensors["in.x"], tensors[f"weights.to_{name}.weight"], tensors.get(f"weights.to_{name}.bias"))
        return out.unflatten(-1, (heads, head_dim)).transpose(1, 2)

    return part("q"), part("k"), part("v")


def project_out(tensors: Tensors, out: Tensor) -> Tensor:
    tokens = out.transpose(1, 2).flatten(2)
    return F.linear(tokens, tensors["weights.to_out.0.weight"], tensors.get("weights.to_out.0.bias"))


def phase(values: Record | None) -> Phase | None:
    return None if values is None else Phase(values["t"], values["local_biase"], values["global_biase"])


def official_mechanism(plugin: Record, clips: int) -> DualScopeAttention:
    """Of the plugin `attn`; the released code has phases only where `dynamic_scale` is on and both are there."""
    plugin.told("top_k_chunk_size")  # read by nothing in the released code
    names = ("local_phase", "global_phase")
    dynamic = plugin.get("dynamic_scale", False) and all(name in plugin for name in names)
    local, shared = (phase(plugin[name]) if dynamic else None for name in names)
    if not dynamic:
        plugin.told(*names)
    return DualScopeAttention(
        padding=plugin["padding"],
        top_k=plugin["top_k"],
        attn_scale=plugin.get("attn_scale", 1.0),
        token_num_scale=plugin.get("token_num_scale", False),
        local_phase=local,
        global_phase=shared,
        official=True,
        clips=clips,
    )


def clean_mechanism(config: Record) -> DualScopeAttention:
    """Of a case that is not official."""
    once, local_bias, global_bias = (config[name] for name in ("dedup_global_in_window", "local_bias", "global_bias"))
    assert not once or local_bias >= global_bias, "a frame seen once keeps the larger bias: this is another rule"
    return DualScopeAttention(
        padding=config["padding"],
        top_k=config["top_k"],
        attn_scale=config["attn_scale"],
        token_num_scale=config["token_num_scale"],
        local_phase=Phase(None, local_bias, global_bias),
        global_phase=None,
        duplicates=not once,
    )


def projected(config: Record, tensors: Tensors) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v of the layer that a case of attention describes."""
    heads, head_dim = config["heads"], config["dim_head"]
    assert tensors["in.x"].shape[-1] == config["dim"]
    return project(tensors, heads, head_dim)
