"""What a query of a layer sees while a pipeline draws."""

from typing import Any

from ..measure.draws import makes_video
from ..measure.watching import Caught, watch
from ..mechanisms.base import Mechanism
from ..media.seeing import plot_seen
from .arguments import parse_cell
from .checkpoints import native_call
from .generation import Request


def at_work(
    pipe: Any,
    model: str,
    mechanism: Mechanism,
    prompt: str,
    query: str | None,
    *,
    layer: str | None,
    step: int | None,
    steps: int | None,
    head: int,
    seed: int,
) -> Any:
    """A figure of what one query sees in one layer and step of a run."""
    if makes_video(pipe):
        raise ValueError(f"{type(pipe).__name__} makes videos, and one picture is drawn: use --grid for a video's grid")
    call = Request(prompt=prompt, seed=seed, steps=steps).arguments(pipe, native_call(model))
    total = call.get("num_inference_steps")
    if step is not None and total is not None and step >= total:
        raise ValueError(f"the run has steps 0 to {total - 1}, got --step {step}")
    picture, caught = watch(pipe, mechanism, lambda: pipe(**call).images[0], layer=layer, step=step, head=head)
    return draw(picture, caught, query, head)


def draw(picture: Any, caught: Caught, query: str | None, head: int) -> Any:
    """The figure of one head's query of the first sample."""
    grid = caught.grid
    _, row, column = (0, grid.height // 2, grid.width // 2) if query is None else parse_cell(query, grid)
    look = caught.look(head, row, column)
    title = f"{caught.mechanism}: {caught.layer}, step {caught.step}, head {head}, row {row}, column {column}"
    return plot_seen(picture, grid, (row, column), look.keys, look.blocks, look.mass, title)
