"""What a query of a layer sees while a pipeline draws."""

from typing import Any

from ..measure.watching import Caught, watch
from ..mechanisms.base import Mechanism
from ..media.drawing import masks
from ..media.seeing import plot_seen
from .arguments import parse_cell
from .checkpoints import native_call
from .generation import Request
from .places import makes_video


def check_seen(mechanism: Mechanism) -> None:
    """Raise `ValueError` for a mechanism that is no choice of keys."""
    able = sorted({*masks(), "routing"})
    if mechanism.type not in able:
        raise ValueError(f"{mechanism.type} does not choose among keys; mechanisms that do: {', '.join(able)}")


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
    token = grid.before + row * grid.width + column
    keys, means, blocks = (part[0, min(head, part.shape[1] - 1)].cpu() for part in caught.seen())
    title = f"{caught.mechanism}: {caught.layer}, step {caught.step}, head {head}, row {row}, column {column}"
    return plot_seen(
        picture,
        grid,
        (row, column),
        keys[token, grid.cell_slice].numpy(),
        blocks[means[token]].numpy(),
        caught.weights(0, head, token).cpu().numpy(),
        title,
    )
