"""Readers of models that get given images behind what they make, on an axis that is else one of frames."""

from torch import nn

from .layout import Arguments, Layout
from .readers import _values, channels_last, video


def kandinsky6(module: nn.Module, call: Arguments) -> tuple[Layout, ...]:
    """Frames of type 0 in `visual_token_type_ids` (b, frames) are the video; the given image is one of type 1 behind.

    The image has the position of the first frame, not of one after the last.
    """
    (layout,) = channels_last(module, call)
    if call.get("visual_token_type_ids") is None:
        return (layout,)
    types = _values(call, "visual_token_type_ids")
    frames = int((types[0] == 0).sum())
    if bool((types[:, :frames] != 0).any() or (types[:, frames:] == 0).any()):
        raise ValueError(
            "visual_token_type_ids must have the frames of the video, of type 0, before given images, in all samples; "
            "call diffattn.restore first"
        )
    given = (types.shape[1] - frames) * layout.height * layout.width
    return (Layout(layout.height, layout.width, frames, before=0, after=given),)


def joy_image_edit(module: nn.Module, call: Arguments) -> tuple[Layout, ...]:
    """(b, c, frames, height, width), text behind; or (b, items, c, frames, height, width), the last item first.

    Then the others, which are given images, lie between it and the text.
    """
    latents = call["hidden_states"]
    if latents.ndim == 6:
        call = {**call, "hidden_states": latents[:, -1]}
    return video(2, before=0, after=None, patch_t="patch_size")(module, call)
