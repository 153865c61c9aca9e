"""Which parts of the pipeline fit together, and what a call gives, checked before anything is computed."""

from collections.abc import Sequence
from typing import Any

from diffusers import AutoencoderKLTemporalDecoder
from torch import Tensor

from .scheduler import STARScheduler
from .settings import CELL
from .sizes import Plan

OUTPUT_TYPES = ("pil", "np", "pt", "latent")


def check_parts(vae: Any, text_encoder: Any, unet: Any, controlnet: Any, scheduler: Any) -> None:
    """Raise `ValueError` for parts that do not belong together."""
    for part, cls in ((vae, AutoencoderKLTemporalDecoder), (scheduler, STARScheduler)):
        if not isinstance(part, cls):
            raise ValueError(f"expected a {cls.__name__}; got a {type(part).__name__}; take that of the checkpoint")
    cell = 2 ** (len(vae.config.block_out_channels) - 1)
    if cell != CELL:
        raise ValueError(f"expected a VAE whose latents are {CELL} times shorter; got {cell} times; take SVD's")
    channels = {"vae": vae.config.latent_channels, "unet": unet.config.in_channels}
    channels |= {"unet's output": unet.config.out_channels, "controlnet": controlnet.config.in_channels}
    channels["controlnet's hint"] = controlnet.config.conditioning_channels
    width = {"text_encoder": text_encoder.config.hidden_size, "unet": unet.config.cross_attention_dim}
    width["controlnet"] = controlnet.config.cross_attention_dim
    levels = {"unet": tuple(unet.config.block_out_channels), "controlnet": tuple(controlnet.config.block_out_channels)}
    for what, values in (("channels of latents", channels), ("width of text", width), ("levels", levels)):
        if len(set(values.values())) > 1:
            got = ", ".join(f"{value} in the {name}" for name, value in values.items())
            raise ValueError(f"expected the same {what} in all parts; got {got}; take all from one checkpoint")


def check_call(output_type: str, callback_tensors: Sequence[str]) -> None:
    """Raise `ValueError` for a name that there is not."""
    for name, values, known in (
        ("output_type", [output_type], OUTPUT_TYPES),
        ("callback_on_step_end_tensor_inputs", callback_tensors, ("latents",)),
    ):
        for value in values:
            if value not in known:
                raise ValueError(f"expected {name} among {', '.join(map(repr, known))}; got {value!r}; pick one")


def check_latents(latents: Tensor | None, plan: Plan, channels: int) -> None:
    """Raise `ValueError` for first latents of another shape than the clip's."""
    shape = (1, channels, plan.frames, *plan.latent)
    if latents is not None and tuple(latents.shape) != shape:
        raise ValueError(f"expected latents of {shape} for this clip; got {tuple(latents.shape)}; leave them out")


def check_frames(frames: Tensor, plan: Plan) -> Tensor:
    """The frames; raises `ValueError` for another size than the plan's."""
    if frames.ndim != 4 or tuple(frames.shape[1:]) != (3, *plan.source):
        raise ValueError(
            f"expected frames (n, 3, {plan.source[0]}, {plan.source[1]}) in 0..1, as planned; got "
            f"{tuple(frames.shape)}; plan with their size"
        )
    return frames
