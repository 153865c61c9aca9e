"""The tab Compare: one prompt under two settings."""

from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from ...comparison import Setting
from .. import html
from ..models import Model, Pair, draw_pair
from .parts import PRIVATE, Desk, drawing_fields, follow, image_models, setting_fields, setting_text, wish_of

PROMPT = "a blue ring in the center on a yellow background"
HEAD = ("setting", "seconds", "attention computed", "PSNR to A")


def build(models: Sequence[Model]) -> None:
    """Put the tab together."""
    import gradio as gr

    able = image_models(models)
    if not able:
        return
    gr.Markdown("The same prompt and noise under two settings: their images, where they differ, and what each took.")
    fields = drawing_fields(able, PROMPT)
    with gr.Row():
        first = setting_fields("A", "full", "")
        second = setting_fields("B", "clear", "radius=4")
    desk = Desk("Draw both", "compare")
    pair_events(able, fields, [first, second], desk, show)


def pair_events(
    models: Sequence[Model],
    fields: dict[str, Any],
    settings: Sequence[list[Any]],
    desk: Desk,
    show: Callable[[Pair], str],
) -> None:
    """Draw a pair at a click, or at Enter in the prompt."""
    import gradio as gr

    by_name = {model.name: model for model in models}
    names = [name for name in fields if name != "model"]
    width = len(settings[0])

    async def run(name: str, *values: Any) -> AsyncIterator[tuple[Any, ...]]:
        model, own, knobs = by_name[name], values[: len(names)], values[len(names) :]

        def prepare() -> Any:
            wish = wish_of(names, own)
            pair = [Setting.parse(setting_text(*part)) for part in (knobs[:width], knobs[width:])]
            return lambda job: draw_pair(model, wish, pair, job)

        async for values_ in follow(model.queue, prepare, lambda pair: (show(pair),)):
            yield values_

    inputs = [fields["model"], *(fields[name] for name in names), *settings[0], *settings[1]]
    gr.on([desk.draw.click, fields["prompt"].submit], run, inputs, desk.outputs, **PRIVATE)


def show(pair: Pair) -> str:
    """Both images, their difference, and the figures."""
    images = [html.pixels_as_images(one.pixels)[0] for one in pair.drawn]
    return html.wipe(images[0], images[1], pair.names) + figures(pair)


def figures(pair: Pair) -> str:
    """A table: seconds of the whole call, share of the attention that was computed, PSNR."""
    head, rows = list(HEAD), []
    for place, (name, drawn) in zip("AB", zip(pair.names, pair.drawn, strict=True), strict=True):
        near = "" if place == "A" else html.decibels(pair.mean)
        rows.append([f"{place}: {name}", f"{drawn.seconds:.2f}", f"{drawn.computed:.1%}", near])
    if pair.flicker is not None:
        head += ["worst frame", "flicker"]
        rows = [[*rows[0], "", ""], [*rows[1], html.decibels(min(pair.psnr)), f"{pair.flicker:.4f}"]]
    return html.table(head, rows, "Seconds are those of the whole call on this machine, now")
