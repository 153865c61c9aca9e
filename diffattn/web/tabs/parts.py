"""What tabs share: fields for a drawing and for a setting, the way of a job from the button to the page."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from importlib import resources
from typing import Any

from ... import config
from ...errors import is_expected
from ...swap.settings.quality import LEVELS
from .. import html
from ..jobs import Cancelled, Job, Queue, Work
from ..models import Model, Wish

logger = logging.getLogger("diffattn")

FULL = "full"
PAUSE = 0.1
"""Seconds between two looks at a job."""
WHOLE = {"step": 1}
"""Of a field for whole numbers; what is none is refused by a line on the page, not by gradio."""


def view(**options: Any) -> Any:
    """A part of the page that shows HTML of `diffattn.web.html`, with what moves in it."""
    import gradio as gr

    return gr.HTML(js_on_load=(resources.files("diffattn.web") / "page.js").read_text(encoding="utf-8"), **options)


def chooser(label: str, names: Callable[[], Iterable[str]]) -> Any:
    """A list of what the named folders hold, the first chosen, and a button that looks for new ones."""
    import gradio as gr

    def find() -> dict[str, Any]:
        found = list(names())
        return {"choices": found, "value": found[0] if found else None}

    with gr.Row():
        which = gr.Dropdown(**find(), label=label, scale=3)
        again = gr.Button("Look for new ones", min_width=140)
    again.click(lambda: gr.update(**find()), None, which, **PRIVATE)
    return which


def image_models(models: Sequence[Model]) -> list[Model]:
    """Those that draw images; where there are none, the page says so."""
    import gradio as gr

    able = [model for model in models if not model.makes_video]
    if not able:
        gr.Markdown("No model that draws images is open: start `diffattn web --model MODEL` with one.")
    return able


def said(error: BaseException) -> str:
    """An error as the one line that the command line would print; a bug is told in the log as well."""
    line = " ".join(str(error).split()) or type(error).__name__
    if is_expected(error):
        return line
    logger.error("a bug, met by the page", exc_info=error)
    return f"{type(error).__name__}: {line}; this is a bug of diffattn, and the terminal shows where"


def setting_text(
    mechanism: str, options: str, quality: str, start: float | None, reuse: int | None, layers: str
) -> str:
    """What the fields of a setting say, as `diffattn.comparison.Setting` reads it."""
    words = [mechanism, *(options or "").split()]
    words += [f"quality={quality}"] if quality else []
    words += [f"start={start:g}"] if start else []
    words += [f"reuse={reuse:g}"] if reuse is not None and reuse != 1 else []
    words += [f"layers={layers.strip()}"] if layers and layers.strip() else []
    return " ".join(words)


def options_of(mechanism: str) -> str:
    """The options of a mechanism, for the page, in Markdown."""
    if mechanism == FULL:
        return "The model's own attention; it has no options."
    found = next(one for one in config.described() if one["name"] == mechanism)
    options = [f"`{one['name']}={one['default'] or 'none'}`" for one in found["options"]]
    return f"{found['summary']} Options: {', '.join(options) or 'none'}."


def setting_fields(place: str, mechanism: str, options: str) -> list[Any]:
    """Fields of a setting, in the order of `setting_text`."""
    import gradio as gr

    with gr.Column(min_width=300), gr.Group(elem_classes="da-setting"):
        gr.Markdown(f"### Setting {place}", elem_classes="da-head")
        names = [FULL, *config.registered()]
        chosen = gr.Dropdown(names, value=mechanism, label=f"Mechanism of {place}")
        typed = gr.Textbox(
            options, label=f"Options of {place}", placeholder="radius=4 pool=2", elem_id=f"options-{place.lower()}"
        )
        told = gr.Markdown(options_of(mechanism), elem_classes="da-told")
        with gr.Accordion("Quality, steps and layers", open=False):
            quality = gr.Dropdown(
                [("none", ""), *((name, name) for name in LEVELS["routing"])],
                value="",
                label=f"Quality of {place}, for routing",
            )
            start = gr.Slider(0, 0.9, value=0, step=0.05, label=f"Start of {place}: share of the steps that stay full")
            reuse = gr.Number(1, label=f"Reuse of {place}: computed in one of so many steps", **WHOLE)
            layers = gr.Textbox("", label=f"Layers of {place}", placeholder="single_transformer_blocks.*")
        chosen.change(options_of, chosen, told, **PRIVATE)
    return [chosen, typed, quality, start, reuse, layers]


PRIVATE: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden", "concurrency_limit": None}
"""Of every event: no door for programs, no veil over what is shown, no queue but the models' own."""


def drawing_fields(models: Sequence[Model], prompt: str, sized: bool = True) -> dict[str, Any]:
    """Fields of a wish, by their names; a model brings its own sizes."""
    import gradio as gr

    first, bundled = models[0], all(model.native for model in models)
    with gr.Row():
        fields = {
            "model": gr.Dropdown([one.name for one in models], value=first.name, label="Model"),
            "prompt": gr.Textbox(prompt, label="Prompt", scale=3, elem_classes="da-prompt"),
        }
    with gr.Row():
        numbers = {"seed": 0, "steps": first.native.get("num_inference_steps")}
        if sized:
            numbers |= {"height": first.native.get("height"), "width": first.native.get("width")}
        if first.makes_video:
            numbers |= {"frames": first.native.get("num_frames")}
        for name, value in numbers.items():
            label = name.capitalize() + (", pixels" if name in ("height", "width") else "")
            info = None if value is not None and bundled else "0: the model's own"
            fields[name] = gr.Number(value or 0, label=label, info=info, min_width=110, **WHOLE)
    own = {"steps": "num_inference_steps", "height": "height", "width": "width", "frames": "num_frames"}
    shown = [name for name in own if name in fields]
    by_name = {one.name: one for one in models}

    def sizes(name: str) -> list[Any]:
        return [by_name[name].native.get(own[field], 0) for field in shown]

    fields["model"].change(sizes, fields["model"], [fields[name] for name in shown], **PRIVATE)
    return fields


def wish_of(names: Sequence[str], values: Sequence[Any]) -> Wish:
    """The fields of `drawing_fields`, but the model, as a wish; one that is 0 or empty is left to the pipeline."""
    given = {name: value for name, value in zip(names, values, strict=True) if value or name == "prompt"}
    return Wish(**given)


class Desk:
    """The button that draws and the one that cancels, where it is told how far it is, errors, and the result."""

    def __init__(self, label: str, name: str) -> None:
        import gradio as gr

        with gr.Row():
            self.draw = gr.Button(label, variant="primary", elem_id=f"{name}-draw")
            self.cancel = gr.Button("Cancel", interactive=False, elem_id=f"{name}-cancel")
        self.status = gr.HTML(elem_id=f"{name}-status")
        self.error = gr.HTML(elem_id=f"{name}-error")
        self.result = view(elem_id=f"{name}-result")
        self.job = gr.State(None)
        self.cancel.click(_cancel, self.job, queue=False, **PRIVATE)

    @property
    def outputs(self) -> list[Any]:
        """Those of `follow`."""
        return [self.job, self.cancel, self.status, self.error, self.result]


def _cancel(job: Job | None) -> None:
    if job is not None:
        job.cancel()


async def follow(
    queue: Queue, prepare: Callable[[], Work], shown: Callable[[Any], tuple[Any, ...]], extra: int = 0
) -> AsyncIterator[tuple[Any, ...]]:
    """Carry out a job and tell of it: values for the outputs of a `Desk`, and for `extra` ones after them.

    Args:
        prepare: checks what was asked for, and gives the work.
        shown: what the work gave, as HTML, and the values for the extra outputs.

    The job is cancelled where the visitor leaves.
    """
    import gradio as gr

    rest = (gr.skip(),) * extra
    free, busy = gr.update(interactive=False), gr.update(interactive=True)
    job = None
    try:
        job = queue.submit(prepare())
        told = _progress(queue, job)
        yield job, busy, html.status(*told), "", "", *rest
        while not job.over:
            await asyncio.sleep(PAUSE)
            if (now := _progress(queue, job)) != told:
                yield job, busy, html.status(*now), "", gr.skip(), *rest
            told = now
        result, *own = await asyncio.to_thread(lambda: shown(job.result()))
        yield None, free, "", "", result + html.notes(job.notes), *own
    except Cancelled:
        done = f" after step {job.step} of {job.steps}" if job is not None and job.steps else ""
        yield None, free, html.status(f"Cancelled{done}. The model is as it was."), "", "", *rest
    except Exception as error:
        yield None, free, "", html.alert(said(error)), "", *rest
    finally:
        if job is not None:
            job.cancel()


def _progress(queue: Queue, job: Job) -> tuple[str, int, int]:
    ahead = queue.ahead(job)
    if ahead:
        others = "job on this model comes" if ahead == 1 else "jobs on this model come"
        return f"Waiting: {ahead} {others} first.", 0, 0
    if job.cancelled:
        return "Stopping at the end of this step.", job.step, job.steps
    part = job.what or "starting"
    step = f", step {job.step} of {job.steps}" if job.steps else ""
    return f"{part[0].upper()}{part[1:]}{step}", job.step, job.steps
