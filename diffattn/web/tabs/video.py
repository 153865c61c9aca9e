"""The tab Video: two clips side by side, frame by frame: drawn under two settings, or of the folders."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from ...measure import psnr_of_frames
from .. import html
from ..found import Folders, Frames, frames_of
from ..models import Model, Pair
from .compare import figures, pair_events
from .parts import PRIVATE, Desk, drawing_fields, said, setting_fields, view

PROMPT = "a red triangle moving sideways on a green background"
RATE = 8.0
"""Frames a second of what was drawn."""


def build(models: Sequence[Model], folders: Folders) -> None:
    """Put the tab together."""
    import gradio as gr

    able = [model for model in models if model.makes_video]
    if able:
        gr.Markdown("The same prompt and noise under two settings, frame by frame.")
        fields = drawing_fields(able, PROMPT)
        with gr.Row():
            first = setting_fields("A", "full", "")
            second = setting_fields("B", "routing", "share=0.25 tile=2 pool=2 order=content")
        pair_events(able, fields, [first, second], Desk("Draw both", "video"), show)
    else:
        gr.Markdown("No model that makes videos is open: start `diffattn web --model MODEL` with one.")
    with gr.Accordion("Two clips of your folders", open=not able, elem_id="clips"):
        _clips(folders)


def show(pair: Pair) -> str:
    """Both videos, and the figures."""
    first, second = (html.pixels_as_images(one.pixels) for one in pair.drawn)
    return html.player(first, second, pair.names, RATE) + figures(pair)


def _clips(folders: Folders) -> None:
    import gradio as gr

    names = list(folders.clips())
    with gr.Row():
        first = gr.Dropdown(names, value=None, label="Clip A")
        second = gr.Dropdown(names, value=None, label="Clip B")
        again = gr.Button("Look for new ones", min_width=140)
    play = gr.Button("Show both", variant="primary", elem_id="clips-show")
    error, result = gr.HTML(elem_id="clips-error"), view(elem_id="clips-result")

    def find() -> tuple[Any, Any]:
        found = list(folders.clips())
        return gr.update(choices=found, value=None), gr.update(choices=found, value=None)

    def both(a: str | None, b: str | None) -> tuple[str, str]:
        try:
            return "", show_clips(folders, a, b)
        except Exception as wrong:
            return html.alert(said(wrong)), ""

    again.click(find, None, [first, second], **PRIVATE)
    play.click(both, [first, second], [error, result], **PRIVATE)


def show_clips(folders: Folders, *names: str | None) -> str:
    """Two clips, by their names, with the PSNR of their frames where they are of one size."""
    found = folders.clips()
    for place, name in zip("AB", names, strict=True):
        if name is None:
            raise ValueError(
                f"choose clip {place}; clips are .mp4 and other videos, .gif, and folders of frame-0000.png"
            )
        if name not in found:
            raise ValueError(f"no clip {name} lies in the folders any more: look for new ones")
    first, second = (frames_of(found[str(name)]) for name in names)
    told = [f"{place}: {one.told}" for place, one in (("A", first), ("B", second)) if one.told]
    told.append(distance(first, second))
    shown = html.player(first.images, second.images, (str(names[0]), str(names[1])), first.rate)
    return f"{shown}{html.notes(told)}"


def distance(first: Frames, second: Frames) -> str:
    """How far two clips are apart, in words."""
    same = len(first.images) == len(second.images) and first.images[0].size == second.images[0].size
    if not same or first.told or second.told:
        return "no PSNR: it is that of whole clips of one size and length"
    values = psnr_of_frames(*(np.stack([np.asarray(image) for image in one.images]) for one in (second, first)))
    mean = float(np.mean(values))
    return f"PSNR of B to A: {html.decibels(mean)} in the mean, {html.decibels(min(values))} at worst"
