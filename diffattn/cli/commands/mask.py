"""The command `diffattn mask`: who sees whom under a mechanism."""

from pathlib import Path
from typing import Annotated

import typer

from ..frame import (
    Device,
    Dtype,
    Grid,
    Options,
    UnusedSeed,
    app,
    examples,
    output_option,
)


@app.command(
    epilog=examples(
        "diffattn mask clear --grid 16x24 --before 4 --query 5,7 -o radius=3",
        "diffattn mask clear --grid 4x12x12 --query 1,6,6 -o radius=4 -o radius_t=2 --output ball.png",
    )
)
def mask(
    mechanism: Annotated[str, typer.Argument(help="Short name of a mechanism that is a mask.")],
    grid: Grid = "16x24",
    before: Annotated[int, typer.Option(min=0, help="Other tokens (text) before the grid.")] = 0,
    after: Annotated[int, typer.Option(min=0, help="Other tokens after the grid.")] = 0,
    query: Annotated[
        str | None, typer.Option(metavar="[F,]ROW,COLUMN", help="The cell whose window is drawn. Default: the middle.")
    ] = None,
    option: Options = None,
    seed: UnusedSeed = 0,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    output: Annotated[Path, output_option("The image, such as .png, .svg or .pdf.")] = Path("mask.png"),
) -> None:
    """Draw who sees whom under a mechanism on any grid, and the window of one query."""
    from diffattn.files.writing import written
    from diffattn.media.drawing import FIGURE_ENDINGS, masks, plot_mask
    from diffattn.media.outputs import check_file

    from ..arguments import parse_cell, parse_device, parse_dtype, parse_grid, parse_mechanism

    check_file(output, FIGURE_ENDINGS, overwrite=True)
    parse_dtype(dtype, parse_device(device))
    cells = parse_grid(grid, before, after)
    chosen = parse_mechanism(mechanism, option or ())
    if mechanism not in masks():
        raise ValueError(f"{mechanism} is not a mask over the tokens; mechanisms that are: {', '.join(masks())}")
    middle = (cells.frames // 2, cells.height // 2, cells.width // 2)
    figure = plot_mask(chosen, cells, middle if query is None else parse_cell(query, cells))
    with written(output) as path:
        figure.savefig(path)
    typer.echo(f"wrote {output}")
