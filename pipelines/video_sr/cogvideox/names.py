"""Where the official checkpoint keeps the weights of `STARCogVideoXTransformer3DModel`.

patch_embed.proj                    mixins.patch_embed.proj_sr
time_embedding.linear_1, 2          time_embed.0, 2
transformer_blocks.i
    norm1.linear                    mixins.adaln_layer.adaLN_modulations.i.1, chunks 0-2 and 6-8 of 12
    norm2.linear                    the same, chunks 3-5 and 9-11
    attn1.to_q, to_k, to_v          transformer.layers.i.attention.query_key_value, thirds 0, 1, 2
    attn1.norm_q, norm_k            mixins.adaln_layer.query_layernorm_list.i, key_layernorm_list.i
    attn1.spa_local, temp_local     transformer.layers.i.spa_local, temp_local
norm_out, proj_out                  mixins.final_layer
"""

import re
from typing import NamedTuple

_WHOLE = {
    "patch_embed.proj": "mixins.patch_embed.proj_sr",
    "patch_embed.text_proj": "mixins.patch_embed.text_proj",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "norm_final": "transformer.final_layernorm",
    "norm_out.linear": "mixins.final_layer.adaLN_modulation.1",
    "norm_out.norm": "mixins.final_layer.norm_final",
    "proj_out": "mixins.final_layer.linear",
}
_BLOCK = {
    "norm1.norm": "transformer.layers.{}.input_layernorm",
    "norm2.norm": "transformer.layers.{}.post_attention_layernorm",
    "norm1.linear": "mixins.adaln_layer.adaLN_modulations.{}.1",
    "norm2.linear": "mixins.adaln_layer.adaLN_modulations.{}.1",
    "attn1.to_q": "transformer.layers.{}.attention.query_key_value",
    "attn1.to_k": "transformer.layers.{}.attention.query_key_value",
    "attn1.to_v": "transformer.layers.{}.attention.query_key_value",
    "attn1.to_out.0": "transformer.layers.{}.attention.dense",
    "attn1.norm_q": "mixins.adaln_layer.query_layernorm_list.{}",
    "attn1.norm_k": "mixins.adaln_layer.key_layernorm_list.{}",
    "attn1.spa_local.conv1": "transformer.layers.{}.spa_local.conv1",
    "attn1.temp_local.conv1": "transformer.layers.{}.temp_local.conv1",
    "ff.net.0.proj": "transformer.layers.{}.mlp.dense_h_to_4h",
    "ff.net.2": "transformer.layers.{}.mlp.dense_4h_to_h",
}
_CHUNKS = {
    "norm1.linear": (12, (0, 1, 2, 6, 7, 8)),
    "norm2.linear": (12, (3, 4, 5, 9, 10, 11)),
    "attn1.to_q": (3, (0,)),
    "attn1.to_k": (3, (1,)),
    "attn1.to_v": (3, (2,)),
}

PARTITIONS = {"query_key_value": 3, "dense": 1}
"""Layers with LoRA in the official checkpoint, and the number of its pairs, one for each equal share of the rows."""

UNUSED = re.compile(r"mixins\.pos_embed\.freqs_(sin|cos)|transformer\.position_embeddings\.weight")
"""Buffers that are left behind: rotary embeddings of the trained size, and positions that the model does not use."""


class Place(NamedTuple):
    """Where a weight is: in these `chunks`, in this order, of the official one's rows cut into `parts`."""

    name: str
    parts: int = 1
    chunks: tuple[int, ...] = (0,)


def official_place(key: str) -> Place:
    """Of a weight of the transformer; `KeyError` for one that has none.

    >>> official_place("transformer_blocks.7.attn1.to_k.bias")
    Place(name='transformer.layers.7.attention.query_key_value.bias', parts=3, chunks=(1,))
    """
    module, _, kind = key.rpartition(".")
    block = re.fullmatch(r"transformer_blocks\.(\d+)\.(.*)", module)
    if not block:
        return Place(f"{_WHOLE[module]}.{kind}")
    number, inner = block.groups()
    return Place(f"{_BLOCK[inner].format(number)}.{kind}", *_CHUNKS.get(inner, ()))


def lora_layer(name: str) -> str | None:
    """The layer of a weight that LoRA changes: `transformer.layers.0.attention.dense` of that and `.weight`."""
    layer, _, _ = name.rpartition(".")
    return layer if layer.rpartition(".")[2] in PARTITIONS and ".attention." in layer else None
