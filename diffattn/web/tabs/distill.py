"""The tab Distill: watch a run, by its log and its sheets."""

import json
from pathlib import Path
from typing import Any

from PIL import Image

from ... import config as mechanisms
from ...distill.training.log import LOG, read_log
from ...media.pictures import read_picture
from .. import charts, html
from ..found import Folders, sheets
from .parts import PRIVATE, chooser, said, view

EVERY = 2.0
"""Seconds between two looks at a run that is followed."""
LATEST = "the latest"
HOW = "diffattn distill run --preset tiny -s sheet_every=100"


def build(page: Any, folders: Folders) -> None:
    """Put the tab together."""
    import gradio as gr

    gr.Markdown(f"Losses and sheets of a run of `diffattn distill`. To start one: `{HOW}`")
    which = chooser("Run", folders.runs)
    following = gr.Checkbox(False, label=f"Follow: look again every {EVERY:g} seconds")
    error, losses = gr.HTML(elem_id="distill-error"), view(elem_id="distill-losses")
    sheet = gr.Dropdown([LATEST], value=LATEST, label="Sheet")
    images = view(elem_id="distill-sheet")
    timer, state = gr.Timer(EVERY, active=False), gr.State(None)

    def look(name: str | None, chosen: str, known: Any, ticked: bool = False) -> tuple[Any, ...]:
        if name is None:
            return html.status("No run lies in the folders."), "", gr.skip(), "", None
        try:
            run = folder_of(folders, name)
            now = (name, chosen, stamps(run))
            if ticked and now == known:
                return (gr.skip(),) * 5
            found = sheets(run)
            value = chosen if chosen in found else LATEST
            choices = gr.update(choices=[LATEST, *found], value=value)
            return "", show(run), choices, show_sheet(found, value), now
        except Exception as wrong:
            return html.alert(said(wrong)), gr.skip(), gr.skip(), gr.skip(), None

    inputs, outputs = [which, sheet, state], [error, losses, sheet, images, state]
    gr.on([which.change, sheet.input, page.load], look, inputs, outputs, **PRIVATE)
    timer.tick(lambda name, chosen, known: look(name, chosen, known, ticked=True), inputs, outputs, **PRIVATE)
    following.change(lambda on: gr.Timer(active=on), following, timer, **PRIVATE)


def folder_of(folders: Folders, name: str) -> Path:
    """The folder of a run; raises `ValueError` where it is gone."""
    found = folders.runs()
    if name not in found:
        raise ValueError(f"no run {name} lies in the folders any more: look for new ones")
    return found[name]


def stamps(run: Path) -> tuple[Any, ...]:
    """Tells whether a run wrote something since."""
    paths = [run / LOG, *sheets(run).values()]
    return tuple((path.name, path.stat().st_mtime_ns, path.stat().st_size) for path in paths)


def show(run: Path) -> str:
    """How far a run is, and its losses."""
    rows = read_log(run / LOG)
    if not rows:
        return html.status("The log has no step yet.")
    return f"<p>{html.escaped(progress(run, rows))}</p>" + charts.losses(rows)


def progress(run: Path, rows: list[dict[str, float]]) -> str:
    """The last step in words."""
    config = _config(run)
    last, steps = rows[-1], config.get("steps")
    seconds = sum(row.get("seconds", 0.0) for row in rows[-20:]) / len(rows[-20:])
    told = [f"step {last['step']}" + (f" of {steps}" if steps else "")]
    told += [f"{seconds:.2f} s a step"] if seconds else []
    told += [f"learning rate {last['rate']:.2g}"] if "rate" in last else []
    told += [_mechanism(config["mechanism"])] if "mechanism" in config else []
    return "; ".join(told)


def _mechanism(values: Any) -> str:
    """As it is written in a line; of another version's, which this one does not read, the values as they are."""
    try:
        return str(mechanisms.from_dict(values))
    except ValueError:
        return str(values)


def _config(run: Path) -> dict[str, Any]:
    """The run's own, which is written a moment after the log begins; empty where there is none."""
    path = run / "config.json"
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"expected the config of a run in {path}; cannot read it ({error})") from error
    return found if isinstance(found, dict) else {}


def show_sheet(found: dict[str, Path], chosen: str) -> str:
    """A sheet of images; the latest where none is chosen."""
    if not found:
        return html.status("This run wrote no sheets: train with -s sheet_every=100.")
    name = chosen if chosen in found else list(found)[-1]
    image = Image.fromarray(read_picture(found[name]).pixels)
    return html.figure(html.img(image, f"{name}: teacher, student and swap alone side by side"), name)
