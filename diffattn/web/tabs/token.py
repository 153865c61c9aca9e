"""The tab What a token sees: a query of a layer at work, chosen on the image."""

from collections.abc import AsyncIterator, Sequence
from typing import Any

from ...comparison import Setting
from ...measure.draws import least_side
from ...measure.watching import choosing
from ...mechanisms.base import Mechanism
from .. import html
from ..models import Model, Seeing, see
from .parts import PRIVATE, WHOLE, Desk, drawing_fields, follow, image_models, options_of, said, wish_of

PROMPT = "a blue ring in the center on a yellow background"


def build(models: Sequence[Model]) -> None:
    """Put the tab together."""
    import gradio as gr

    able = image_models(models)
    if not able:
        return
    gr.Markdown("Draw once; then choose a token by a click, the arrow keys, or its row and column.")
    fields = drawing_fields(able, PROMPT)
    with gr.Row():
        mechanism = gr.Dropdown(choosing(), value="routing", label="Mechanism")
        options = gr.Textbox("share=0.5 tile=2 pool=2", label="Options", elem_id="token-options", scale=2)
    told = gr.Markdown(options_of("routing"), elem_classes="da-told")
    mechanism.change(options_of, mechanism, told, **PRIVATE)
    with gr.Row():
        layers = able[0].layers
        layer = gr.Dropdown(list(layers), value=layers[len(layers) // 2], label="Layer", scale=2)
        step = gr.Number(2, label="Step, from 0", min_width=110, **WHOLE)
        head = gr.Number(0, label="Head, from 0", min_width=110, **WHOLE)
        middle = [able[0].native.get(side, 0) // least_side(able[0].pipe) // 2 for side in ("height", "width")]
        row = gr.Number(middle[0], label="Row of the token", min_width=110, **WHOLE)
        column = gr.Number(middle[1], label="Column of the token", min_width=110, **WHOLE)
    by_name = {model.name: model for model in able}

    def layers_of(name: str) -> Any:
        own = by_name[name].layers
        return gr.update(choices=list(own), value=own[len(own) // 2])

    fields["model"].change(layers_of, fields["model"], layer, **PRIVATE)
    desk = Desk("Draw, and look", "token")
    _draw_events(by_name, fields, [mechanism, options, layer, step], [head, row, column], desk)


def _draw_events(
    by_name: dict[str, Model], fields: dict[str, Any], layer: list[Any], place: list[Any], desk: Desk
) -> None:
    """Draw at a click on the button; look anew wherever another token or head is chosen."""
    import gradio as gr

    names, kept = [name for name in fields if name != "model"], gr.State(None)

    async def run(name: str, *values: Any) -> AsyncIterator[tuple[Any, ...]]:
        model, own = by_name[name], values[: len(names)]
        mechanism, options, where, step, head, row, column = values[len(names) :]

        def prepare() -> Any:
            wish, chosen = wish_of(names, own), mechanism_of(mechanism, options)
            return lambda job: see(model, wish, chosen, where, int(step or 0), job)

        def shown(seeing: Seeing) -> tuple[Any, ...]:
            return show(seeing, head, row, column), seeing

        async for values_ in follow(model.queue, prepare, shown, extra=1):
            yield values_

    def look(seeing: Seeing | None, *chosen: Any) -> tuple[Any, Any]:
        if seeing is None:
            return gr.skip(), gr.skip()
        try:
            return "", show(seeing, *chosen)
        except ValueError as error:
            return html.alert(said(error)), gr.skip()

    def choose(seeing: Seeing | None, head: int | None, event: gr.EventData) -> tuple[Any, ...]:
        return event.row, event.column, *look(seeing, head, event.row, event.column)

    inputs = [fields["model"], *(fields[name] for name in names), *layer, *place]
    gr.on([desk.draw.click, fields["prompt"].submit], run, inputs, [*desk.outputs, kept], **PRIVATE)
    gr.on([one.input for one in place], look, [kept, *place], [desk.error, desk.result], **PRIVATE)
    desk.result.select(choose, [kept, place[0]], [*place[1:], desk.error, desk.result], **PRIVATE)


def mechanism_of(name: str, options: str) -> Mechanism:
    """A mechanism by its name and options; raises `ValueError` for options of a swap, such as start=."""
    setting = Setting.parse(f"{name} {options or ''}")
    if setting.options or not isinstance(setting.mechanism, Mechanism):
        raise ValueError(
            f"what a token sees is of a mechanism's own options: leave {', '.join(setting.options) or name} out"
        )
    return setting.mechanism


def show(seeing: Seeing, head: int | None, row: int | None, column: int | None) -> str:
    """What a query sees, None: the middle one's; raises `ValueError` for a head, row or column that is not there."""
    grid = seeing.caught.grid
    given = {"head": (head or 0, seeing.heads), "row": (row, grid.height), "column": (column, grid.width)}
    chosen = {}
    for name, (value, count) in given.items():
        number = count // 2 if value is None else value
        if not isinstance(number, int) or not 0 <= number < count:
            raise ValueError(f"expected a {name} from 0 to {count - 1}, got {number}")
        chosen[name] = number
    look = seeing.caught.look(chosen["head"], chosen["row"], chosen["column"], seeing.seen)
    where = f"{seeing.caught.mechanism} in {seeing.caught.layer}, step {seeing.caught.step}, head {chosen['head']}"
    return (
        f"<p>{html.escaped(where)}</p>"
        + html.token_map(seeing.image, grid, (chosen["row"], chosen["column"]), look)
        + html.mass_table(grid, look)
    )
