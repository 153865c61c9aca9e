"""Models that are built as Wan is."""

import torch
from tiny_model import _WAN, Tiny, Tokens, _make, _wan_inputs, _without, draw

from .videos import VIDEO


def chrono_edit() -> Tiny:
    return Tiny(_make("ChronoEditTransformer3DModel", **_WAN), _wan_inputs(), {r"blocks\.\d+\.attn1": (VIDEO,)})


def wan_vace() -> Tiny:
    """The blocks of the control see the same cells."""
    model = _make("WanVACETransformer3DModel", **_WAN, vace_layers=[0, 1], vace_in_channels=6)
    inputs = {**_wan_inputs(), "control_hidden_states": draw(2, 6, 3, 8, 10)}
    return Tiny(model, inputs, {r"(vace_)?blocks\.\d+\.attn1": (VIDEO,)})


def skyreels_v2() -> Tiny:
    return Tiny(_make("SkyReelsV2Transformer3DModel", **_WAN), _wan_inputs(), {r"blocks\.\d+\.attn1": (VIDEO,)})


def wan_animate() -> Tiny:
    """The first frame is the person's image; the video of the pose has one frame less, that of the face five."""
    model = _make(
        "WanAnimateTransformer3DModel",
        **{**_WAN, "in_channels": 12, "latent_channels": 4},
        image_dim=8,
        motion_encoder_channel_sizes={"4": 8, "8": 8},
        motion_encoder_size=8,
        motion_style_dim=8,
        motion_dim=4,
        motion_encoder_dim=8,
        face_encoder_hidden_dim=8,
        face_encoder_num_heads=2,
        inject_face_latents_blocks=2,
    )
    inputs = {
        **_wan_inputs(),
        "hidden_states": draw(2, 12, 3, 8, 10),
        "encoder_hidden_states_image": draw(2, 4, 8),
        "pose_hidden_states": draw(2, 4, 2, 8, 10),
        "face_pixel_values": draw(2, 3, 5, 8, 8),
    }
    return Tiny(model, inputs, {r"blocks\.\d+\.attn1": (VIDEO,)})


def any_flow() -> Tiny:
    """Frames on the first axis after the batch."""
    model = _make("AnyFlowTransformer3DModel", **_WAN)
    inputs = {
        **_wan_inputs(),
        "hidden_states": draw(2, 3, 4, 8, 10),
        "timestep": torch.tensor([[7, 7, 7], [3, 3, 3]]),
        "r_timestep": torch.tensor([[2, 2, 2], [1, 1, 1]]),
    }
    return Tiny(model, inputs, {r"blocks\.\d+\.attn1": (VIDEO,)})


def helios() -> Tiny:
    """Frames made before lie before the cells: one in full, two and four in coarser patches."""
    model = _make("HeliosTransformer3DModel", **_without(_WAN, "rope_max_seq_len"), rope_dim=(4, 4, 4))
    inputs = {
        **_wan_inputs(),
        "indices_hidden_states": torch.arange(7, 10).expand(2, -1),
        "latents_history_short": draw(2, 4, 1, 8, 10),
        "indices_latents_history_short": torch.tensor([[6]] * 2),
        "latents_history_mid": draw(2, 4, 2, 8, 10),
        "indices_latents_history_mid": torch.tensor([[4, 5]] * 2),
        "latents_history_long": draw(2, 4, 4, 8, 10),
        "indices_latents_history_long": torch.tensor([[0, 1, 2, 3]] * 2),
    }
    history = 4 * 5 + 2 * 3 + 1 * 2
    return Tiny(model, inputs, {r"blocks\.\d+\.attn1": (Tokens(history, 3, 4, 5),)})
