"""Names of weights in the official checkpoint, from those in diffusers.

    down_blocks.L.resnets.j           input_blocks.(3L + j + 1).0
    down_blocks.L.attentions.j        input_blocks.(3L + j + 1).1
    down_blocks.L.downsamplers.0      input_blocks.(3L + 3).0
    down_blocks.L.motion_modules.j    input_blocks_motion_module.(2L + j).0.temporal_transformer
    up_blocks.L.resnets.j             output_blocks.(3L + j).0
    up_blocks.L.attentions.j          output_blocks.(3L + j).1
    up_blocks.L.upsamplers.0          output_blocks.(3L + 2).2, or .1 without attention
    up_blocks.L.motion_modules.j      output_blocks_motion_module.(3L + j).0.temporal_transformer

for networks of two layers a level and without attention in the deepest one, as Stable Diffusion's are.
"""

import re
from collections.abc import Callable

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_MOTION = {
    "attn1": "attention_blocks.0",
    "attn2": "attention_blocks.1",
    "norm1": "norms.0",
    "norm2": "norms.1",
    "norm3": "ff_norm",
    "pos_embed": "attention_blocks.0.pos_encoder",
}
_VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}

_WHOLE = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "mid_block.attentions.0": "middle_block.1",
    "controlnet_mid_block": "middle_block_out.0",
    "controlnet_cond_embedding.conv_in": "input_hint_block.0",
    "controlnet_cond_embedding.conv_out": "input_hint_block.14",
}

Rules = list[tuple[str, Callable[[re.Match[str]], str]]]
"""A pattern for the beginning of a name, and the official beginning in its place."""


def _number(match: re.Match[str], factor: int, added: int = 0) -> int:
    return factor * int(match["level"]) + int(match["layer"]) + added


_LAYER = r"_blocks\.(?P<level>\d+)\.{}\.(?P<layer>\d+)"
_UNET: Rules = [
    *((re.escape(name) + r"(?=\.)", lambda m, official=official: official) for name, official in _WHOLE.items()),
    ("down" + _LAYER.format("resnets"), lambda m: f"input_blocks.{_number(m, 3, 1)}.0"),
    ("down" + _LAYER.format("attentions"), lambda m: f"input_blocks.{_number(m, 3, 1)}.1"),
    ("down" + _LAYER.format("downsamplers") + r"\.conv", lambda m: f"input_blocks.{_number(m, 3, 3)}.0.op"),
    (
        "down" + _LAYER.format("motion_modules"),
        lambda m: f"input_blocks_motion_module.{_number(m, 2)}.0.temporal_transformer",
    ),
    (r"mid_block\.resnets\.(?P<layer>\d+)", lambda m: f"middle_block.{2 * int(m['layer'])}"),
    ("up" + _LAYER.format("resnets"), lambda m: f"output_blocks.{_number(m, 3)}.0"),
    ("up" + _LAYER.format("attentions"), lambda m: f"output_blocks.{_number(m, 3)}.1"),
    (
        "up" + _LAYER.format("upsamplers"),
        lambda m: f"output_blocks.{_number(m, 3, 2)}.{1 if m['level'] == '0' else 2}",
    ),
    (
        "up" + _LAYER.format("motion_modules"),
        lambda m: f"output_blocks_motion_module.{_number(m, 3)}.0.temporal_transformer",
    ),
    (r"controlnet_down_blocks\.(?P<layer>\d+)", lambda m: f"zero_convs.{m['layer']}.0"),
    (
        r"controlnet_cond_embedding\.blocks\.(?P<layer>\d+)",
        lambda m: f"input_hint_block.{2 * int(m['layer']) + 2}",
    ),
]
_SIDE = r"(?P<side>en|de)coder\."
_VAE: Rules = [
    (_SIDE + r"mid_block\.resnets\.(?P<layer>\d+)", lambda m: f"{m['side']}coder.mid.block_{int(m['layer']) + 1}"),
    (_SIDE + r"mid_block\.attentions\.0", lambda m: f"{m['side']}coder.mid.attn_1"),
    (_SIDE + r"conv_norm_out", lambda m: f"{m['side']}coder.norm_out"),
    (r"encoder\.down" + _LAYER.format("resnets"), lambda m: f"encoder.down.{m['level']}.block.{m['layer']}"),
    (r"encoder\.down" + _LAYER.format("downsamplers"), lambda m: f"encoder.down.{m['level']}.downsample"),
    (r"decoder\.up" + _LAYER.format("resnets"), lambda m: f"decoder.up.{3 - int(m['level'])}.block.{m['layer']}"),
    (r"decoder\.up" + _LAYER.format("upsamplers"), lambda m: f"decoder.up.{3 - int(m['level'])}.upsample"),
]


def official_name(key: str) -> str:
    """Of a weight of a U-Net, motion modules included, of the appearance network or of a ControlNet; no prefix.

    >>> official_name("up_blocks.1.upsamplers.0.conv.bias"), official_name("down_blocks.3.resnets.0.conv2.weight")
    ('output_blocks.5.2.conv.bias', 'input_blocks.10.0.out_layers.3.weight')
    """
    name, rest = _begin(_UNET, key)
    if name.endswith("temporal_transformer"):
        return name + motion_name(rest)
    return name + (_rename(_RESNET, rest) if ".resnets." in key else rest)


def motion_name(key: str) -> str:
    """Of a weight inside a motion module."""
    block, found, rest = key.partition("transformer_blocks.0.")
    return block + found + _rename(_MOTION, rest) if found else key


def official_vae_name(key: str) -> str:
    """Of a weight of the VAE with four levels."""
    name, rest = _begin(_VAE, key)
    rest = _rename(_VAE_ATTENTION, rest) if ".attentions." in key else rest
    return name + rest.replace("conv_shortcut", "nin_shortcut")


def official_text_name(key: str) -> str:
    """Of a weight of CLIP's text encoder; transformers 5 left out the `text_model`."""
    return f"text_model.{key.removeprefix('text_model.')}"


def _begin(rules: Rules, key: str) -> tuple[str, str]:
    """The official beginning of a name, and the rest of it."""
    for pattern, official in rules:
        match = re.match(pattern, key)
        if match:
            return official(match), key[match.end() :]
    return "", key


def _rename(names: dict[str, str], rest: str) -> str:
    """Replace the first module in `rest`, with the dots around it."""
    for name, official in names.items():
        if re.match(rf"\.?{re.escape(name)}\.", rest):
            return rest.replace(name, official, 1)
    return rest
