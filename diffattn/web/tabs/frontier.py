"""The tab Speed and fidelity: a comparison that `diffattn compare` wrote, its frontier and its images."""

from typing import Any

from ...comparison import Comparison, open_comparison
from ...comparison.report import HEAD, cells
from ...measure.hardware import hardware_line
from .. import charts, html
from ..found import Folders
from .parts import PRIVATE, chooser, said, view

HOW = "diffattn compare tiny --prompts prompts.txt --setting 'clear radius=4' --setting 'routing quality=balanced'"
RATE = 8.0
"""Frames a second at which videos are played: a comparison does not say."""


def build(page: Any, folders: Folders) -> None:
    """Put the tab together."""
    import gradio as gr

    gr.Markdown(f"What `diffattn compare` found. Choose a point to see its images. To make one: `{HOW}`")
    which = chooser("Comparison", folders.comparisons)
    error = gr.HTML(elem_id="frontier-error")
    chart = view(elem_id="frontier-chart")
    with gr.Row():
        setting = gr.Dropdown([], label="Setting", scale=3)
        prompt = gr.Dropdown([], label="Prompt", scale=3)
    images, table = view(elem_id="frontier-images"), gr.HTML(elem_id="frontier-table")

    def open_one(name: str | None) -> tuple[Any, ...]:
        none = gr.update(choices=[], value=None)
        if name is None:
            return html.status("No comparison lies in the folders."), "", none, none, ""
        try:
            found = opened(folders, name)
        except Exception as wrong:
            return html.alert(said(wrong)), "", none, none, ""
        others = list(found.settings[1:])
        prompts = [(words(found, number), number) for number in range(len(found.setup["prompts"]))]
        chosen = others[0] if others else None
        first, second = gr.update(choices=others, value=chosen), gr.update(choices=prompts, value=0)
        return "", charts.frontier(found, chosen or ""), first, second, figures(found)

    def look(name: str | None, chosen: str | None, number: int | None) -> tuple[Any, Any, Any]:
        if name is None or chosen is None or number is None:
            return gr.skip(), "", gr.skip()
        try:
            found = opened(folders, name)
            return "", show(found, chosen, number), charts.frontier(found, chosen)
        except Exception as wrong:
            return html.alert(said(wrong)), "", gr.skip()

    def choose(event: gr.EventData) -> Any:
        return event.setting

    looked = (look, [which, setting, prompt], [error, images, chart])
    first = gr.on([which.change, page.load], open_one, which, [error, chart, setting, prompt, table], **PRIVATE)
    first.success(*looked, **PRIVATE)
    gr.on([setting.input, prompt.input], *looked, **PRIVATE)
    chart.select(choose, None, setting, **PRIVATE).then(*looked, **PRIVATE)


def opened(folders: Folders, name: str) -> Comparison:
    """The comparison of this name; raises `ValueError` where it is gone or broken."""
    found = folders.comparisons()
    if name not in found:
        raise ValueError(f"no comparison {name} lies in the folders any more: look for new ones")
    return open_comparison(found[name])


def words(comparison: Comparison, number: int) -> str:
    """A prompt as its text."""
    return f"{number}: {comparison.setup['prompts'][number].get('prompt', 'no text')}"


def show(comparison: Comparison, setting: str, number: int) -> str:
    """Full attention's image beside the setting's; raises `ValueError` for what it does not have."""
    rows = {row.prompt: row for row in comparison.of(setting)}
    if number not in rows:
        raise ValueError(f"this comparison has no prompt {number} by {setting}: choose another")
    full = comparison.settings[0]
    first, second = (html.pixels_as_images(comparison.pixels(number, name)) for name in (full, setting))
    row, names = rows[number], (full, setting)
    told = f"{row.seconds:.2f} s, {row.computed:.1%} of the attention computed, {html.decibels(row.psnr)}"
    shown = html.wipe(first[0], second[0], names) if len(first) == 1 else html.player(first, second, names, RATE)
    return f"<p>{html.escaped(f'{setting}: {told}')}</p>{shown}"


def figures(comparison: Comparison) -> str:
    """The table of `compare.md`."""
    rows = [cells(line, number == 0) for number, line in enumerate(comparison.lines)]
    rows = [[row[0].strip("`"), *row[1:]] for row in rows]
    kept = [column for column in range(len(HEAD)) if any(row[column] for row in rows)]
    count = len(comparison.of(comparison.settings[0]))
    caption = f"Medians over {count} prompts; {hardware_line(comparison.machine)}"
    return html.table([HEAD[at] for at in kept], [[row[at] for at in kept] for row in rows], caption)
