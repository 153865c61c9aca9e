"""What the recorded cases of Video-Infinity have in common: their settings, and the projections of an attention."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from diffattn.mechanisms.dual_scope import DualScopeAttention
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


def clean_mechanism(config: dict[str, Any]) -> tuple[DualScopeAttention, int, int, int]:
    """Of a case that is not official: mechanism, width of the layer, heads and their dimension."""
    _, dim, heads, head_dim, padding, top_k, local_bias, global_bias, attn_scale, by_number, once = take(
        config,
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
    return mechanism, dim, heads, head_dim
