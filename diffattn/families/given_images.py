"""Readers of models that get given images on the axis of frames, behind the video."""

from torch import nn

from .layout import Arguments, Layout
from .readers import _values, channels_last


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
