"""Names of Wan's weights: the original ones, and diffusers'."""

import re

BLOCK = {
    "modulation": "scale_shift_table",
    "self_attn.q": "attn1.to_q",
    "self_attn.k": "attn1.to_k",
    "self_attn.v": "attn1.to_v",
    "self_attn.o": "attn1.to_out.0",
    "self_attn.norm_q": "attn1.norm_q",
    "self_attn.norm_k": "attn1.norm_k",
    "cross_attn.q": "attn2.to_q",
    "cross_attn.k": "attn2.to_k",
    "cross_attn.v": "attn2.to_v",
    "cross_attn.o": "attn2.to_out.0",
    "cross_attn.norm_q": "attn2.norm_q",
    "cross_attn.norm_k": "attn2.norm_k",
    "cross_attn.k_img": "attn2.add_k_proj",
    "cross_attn.v_img": "attn2.add_v_proj",
    "cross_attn.norm_k_img": "attn2.norm_added_k",
    "norm3": "norm2",
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
}
"""Within a block."""
TOP = {
    "patch_embedding": "patch_embedding",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "img_emb.proj.0": "condition_embedder.image_embedder.norm1",
    "img_emb.proj.1": "condition_embedder.image_embedder.ff.net.0.proj",
    "img_emb.proj.3": "condition_embedder.image_embedder.ff.net.2",
    "img_emb.proj.4": "condition_embedder.image_embedder.norm2",
    "head.modulation": "scale_shift_table",
    "head.head": "proj_out",
}
"""Outside of the blocks."""
_FROM_BLOCK = {name: original for original, name in BLOCK.items()}
_FROM_TOP = {name: original for original, name in TOP.items()}


def to_original(name: str) -> str | None:
    """The original name of a parameter or module by diffusers' name; None where it has none."""
    return _renamed(name, _FROM_BLOCK, _FROM_TOP)


def to_diffusers(name: str) -> str | None:
    """Undo `to_original`."""
    return _renamed(name, BLOCK, TOP)


def _renamed(name: str, block: dict[str, str], top: dict[str, str]) -> str | None:
    """By the tables, with or without a `.weight` or `.bias` at the end."""
    start, own, end = _parts(name)
    found = (block if start else top).get(own)
    return None if found is None else f"{start}{found}{end}"


def _parts(name: str) -> tuple[str, str, str]:
    """`blocks.N.`, the module, `.weight` or `.bias`; first and last may be missing."""
    found = re.fullmatch(r"(blocks\.\d+\.)?(.+?)(\.weight|\.bias)?", name)
    assert found is not None
    return found[1] or "", found[2], found[3] or ""
