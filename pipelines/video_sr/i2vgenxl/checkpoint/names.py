"""Names of weights in the official I2VGen-XL checkpoint, from those in diffusers.

With n layers in a level, of which 2 are official, and the b-th level:

    down_blocks.b.resnets.j, temp_convs.j       input_blocks.((n + 1) b + j + 1).0
    down_blocks.b.attentions.j                  input_blocks.((n + 1) b + j + 1).1
    down_blocks.b.temp_attentions.j             input_blocks.((n + 1) b + j + 1).2
    down_blocks.b.downsamplers.0.conv           input_blocks.((n + 1) b + n + 1).op
    up_blocks.b.resnets.j, temp_convs.j         output_blocks.((n + 1) b + j).0
    up_blocks.b.attentions.j                    output_blocks.((n + 1) b + j).1
    up_blocks.b.temp_attentions.j               output_blocks.((n + 1) b + j).2
    up_blocks.b.upsamplers.0.conv               output_blocks.((n + 1) b + n).3.conv, or .1.conv without attention
    mid_block.resnets.j, temp_convs.j           middle_block.(3 j)

The names inside of transformers are the same.
"""

import re
from collections.abc import Iterable

CONTROL = "VideoControlNet."
"""What the names of the control branch begin with."""

_WHOLE = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "transformer_in": "input_blocks.0.1",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.temp_attentions.0": "middle_block.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "controlnet_cond_embedding": "input_hint_block",
    "controlnet_mid_block": "middle_block_out.0",
}
_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_PARTS = {"resnets": "0", "temp_convs": "0.temopral_conv", "attentions": "1", "temp_attentions": "2"}
"""Where a layer's parts are in its official block; the released code spells the convolution so."""

_LAYER = re.compile(r"(?P<side>down|mid|up)_block(s\.(?P<level>\d+))?\.(?P<part>\w+)\.(?P<layer>\d+)\.(?P<rest>.*)")


def official_names(keys: Iterable[str], layers: int = 2) -> dict[str, str]:
    """The official name, without prefix, of each weight of a network, by its name in diffusers.

    Args:
        keys: all names of a `STARUNet3DConditionModel` or of a `STARControlNetModel`.
        layers: `layers_per_block` of its configuration.

    >>> official_names(["up_blocks.0.upsamplers.0.conv.bias", "mid_block.temp_convs.1.conv1.0.bias"])
    {'up_blocks.0.upsamplers.0.conv.bias': 'output_blocks.2.1.conv.bias', \
'mid_block.temp_convs.1.conv1.0.bias': 'middle_block.3.temopral_conv.conv1.0.bias'}
    """
    keys = list(keys)
    attentive = {match[1] for key in keys if (match := re.match(r"up_blocks\.(\d+)\.attentions\.", key))}
    return {key: _official_name(key, layers, attentive) for key in keys}


def _official_name(key: str, layers: int, attentive: set[str]) -> str:
    for name, official in _WHOLE.items():
        if key.startswith(f"{name}."):
            return official + key.removeprefix(name)
    zero = re.match(r"controlnet_down_blocks\.(\d+)\.", key)
    if zero:
        return f"zero_convs.{zero[1]}.0.{key[zero.end() :]}"
    match = _LAYER.fullmatch(key)
    if match is None:
        raise ValueError(f"expected the name of a weight of STAR's networks; got {key}")
    return _layer_name(match, layers, attentive)


def _layer_name(match: re.Match[str], layers: int, attentive: set[str]) -> str:
    side, part, rest, layer = match["side"], match["part"], match["rest"], int(match["layer"])
    if part == "resnets":
        name, _, last = rest.rpartition(".")
        rest = f"{_RESNET[name]}.{last}"
    if side == "mid":
        return f"middle_block.{3 * layer}{_PARTS[part].removeprefix('0')}.{rest}"
    first = (layers + 1) * int(match["level"])
    if part == "downsamplers":
        return f"input_blocks.{first + layers + 1}.op.{rest.removeprefix('conv.')}"
    if part == "upsamplers":
        return f"output_blocks.{first + layers}.{3 if match['level'] in attentive else 1}.{rest}"
    if side == "down":
        return f"input_blocks.{first + layer + 1}.{_PARTS[part]}.{rest}"
    return f"output_blocks.{first + layer}.{_PARTS[part]}.{rest}"
