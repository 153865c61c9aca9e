"""What a run may be set to and which parts fit, checked before anything is computed."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from .sampling.denoiser import MODES
from .sampling.features import CELL

OUTPUT_TYPES = ("pil", "np", "pt", "latent")


def check_choices(control_mode: str, output_type: str, callback_tensors: Sequence[str]) -> None:
    """Raise `ValueError` for a name that there is not."""
    for name, values, known in (
        ("control_mode", [control_mode], MODES),
        ("output_type", [output_type], OUTPUT_TYPES),
        ("callback_on_step_end_tensor_inputs", callback_tensors, ("latents",)),
    ):
        for value in values:
            if value not in known:
                raise ValueError(f"expected {name} among {', '.join(map(repr, known))}; got {value!r}")


def check_numbers(height: int, width: int, counts: Mapping[str, int]) -> None:
    """Raise `ValueError` for sides that are no whole number of latent cells, and for counts below 1."""
    if min(height, width) < CELL or height % CELL or width % CELL:
        raise ValueError(
            f"expected a height and a width that are multiples of {CELL}; got {height} and {width}; 512 is usual"
        )
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"expected a {name} of at least 1; got {count}")


def check_windows(size: int, overlap: int, positions: int) -> None:
    """Raise `ValueError` for windows longer than the motion modules have positions for, or that their overlap fills."""
    if not 0 <= overlap < size <= positions:
        raise ValueError(
            f"expected a window_size of at most {positions}, as the motion modules have positions, and a smaller "
            f"window_overlap; got {size} and {overlap}; 16 and 4 are usual"
        )


def check_frames(driving: Tensor, local: Tensor, latents: Tensor | None) -> None:
    """Raise `ValueError` for frames, or latents of them, of another number or size."""
    if len(driving) != len(local):
        raise ValueError(
            f"expected as many images of eyes and mouth as driving frames; got {len(local)} and {len(driving)}; make "
            "one of each frame"
        )
    frames, _, rows, columns = driving.shape
    shape = (frames, 4, rows // CELL, columns // CELL)
    if latents is not None and latents.shape != shape:
        raise ValueError(f"expected latents of shape {shape}; got {tuple(latents.shape)}")


def check_offsets(offsets: Sequence[int], steps: int) -> None:
    """Raise `ValueError` unless there is an offset for each step."""
    if len(offsets) != steps or any(offset < 0 for offset in offsets):
        raise ValueError(f"expected {steps} offsets from 0, one for each step; got {list(offsets)}")


def check_parts(unet: Any, reference_unet: Any, controlnet: Any, vae: Any, null_text: Any) -> None:
    """Raise `ValueError` for parts of unlike models; None, for a part that comes later, fits everything."""
    nets = getattr(controlnet, "nets", ())
    if controlnet is not None and len(nets) != 2:
        raise ValueError(
            "expected a MultiControlNetModel of two ControlNets, of whole frames and of eyes and mouth; "
            f"got {type(controlnet).__name__} of {len(nets)}"
        )
    for name, other in (("reference_unet", reference_unet), *(("controlnet", net) for net in nets)):
        for setting in ("cross_attention_dim", "block_out_channels"):
            if unet is not None and other is not None and tuple_of(unet, setting) != tuple_of(other, setting):
                raise ValueError(
                    f"expected networks of one checkpoint; {setting} is {unet.config[setting]} in the unet and "
                    f"{other.config[setting]} in the {name}"
                )
    if unet is not None and null_text is not None and null_text.config.width != unet.config.cross_attention_dim:
        raise ValueError(
            f"expected a null_text of width {unet.config.cross_attention_dim}, as the unet takes; got one of "
            f"{null_text.config.width}"
        )
    if vae is not None and 2 ** (len(vae.config.block_out_channels) - 1) != CELL:
        raise ValueError(f"expected a VAE that makes sides {CELL} times shorter; got {vae.config.block_out_channels}")


def tuple_of(network: Any, setting: str) -> tuple[int, ...]:
    """A setting; lists, which it is read as from a file, and tuples are the same."""
    value = network.config[setting]
    return (value,) if isinstance(value, int) else tuple(value)
