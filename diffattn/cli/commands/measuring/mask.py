"""The command `diffattn mask`: who sees whom under a mechanism, on any grid or in a layer at work."""

from pathlib import Path
from typing import Annotated, Any

import typer

from ...frame import (
    Device,
    Dtype,
    Options,
    Seed,
    app,
    examples,
    opened,
    output_option,
    quiet,
)


@app.command(
    epilog=examples(
        "diffattn mask clear --grid 16x24 --before 4 --query 5,7 -o radius=3",
        "diffattn mask clear --grid 4x12x12 --query 1,6,6 -o radius=4 -o radius_t=2 --output ball.png",
        "diffattn mask routing -o share=0.5 -o tile=2 -o pool=2 --model tiny --prompt 'a blue ring' --query 7,4",
    )
)
def mask(
    mechanism: Annotated[str, typer.Argument(help="Short name of a mechanism that is a mask, or of routing.")],
    grid: Annotated[
        str | None,
        typer.Option(metavar="[FRAMESx]ROWSxCOLUMNS", help="Grid of tokens. Default: 16x24, or the layer's own."),
    ] = None,
    before: Annotated[int, typer.Option(min=0, help="Other tokens (text) before the grid.")] = 0,
    after: Annotated[int, typer.Option(min=0, help="Other tokens after the grid.")] = 0,
    query: Annotated[
        str | None, typer.Option(metavar="[F,]ROW,COLUMN", help="The cell whose window is drawn. Default: the middle.")
    ] = None,
    option: Options = None,
    model: Annotated[
        str | None, typer.Option(help="Hub id, folder or tiny: draw what a query of one of its layers sees at work.")
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="With --model: what it draws meanwhile.")] = None,
    layer: Annotated[
        str | None, typer.Option(help="With --model: name of the layer, or a part of it. Default: the middle one.")
    ] = None,
    step: Annotated[
        int | None, typer.Option(min=0, help="With --model: denoising step, counted from 0. Default: the middle one.")
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="With --model: denoising steps. Default: its own.")] = None,
    head: Annotated[int, typer.Option(min=0, help="With --model: number of the attention head.")] = 0,
    seed: Seed = 0,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    output: Annotated[Path, output_option("The image, such as .png, .svg or .pdf.")] = Path("mask.png"),
) -> None:
    """Draw who sees whom under a mechanism on any grid, or what one query sees in a model at work."""
    from diffattn.files.writing import written
    from diffattn.media.drawing import FIGURE_ENDINGS
    from diffattn.media.outputs import check_file

    from ...arguments import parse_device, parse_dtype, parse_grid, parse_mechanism

    check_file(output, FIGURE_ENDINGS, overwrite=True)
    parse_dtype(dtype, parse_device(device))
    if model is None:
        if (prompt, layer, step, steps, head) != (None, None, None, None, 0):
            raise ValueError("--prompt, --layer, --step, --steps and --head are those of a model at work: add --model")
        cells = parse_grid(grid or "16x24", before, after)
        figure = on_grid(parse_mechanism(mechanism, option or ()), cells, query)
    else:
        if grid is not None or before or after:
            raise ValueError("--grid, --before and --after are the model's own with --model: leave them out")
        if prompt is None:
            raise ValueError("say what the model shall draw meanwhile: add --prompt")
        chosen = parse_mechanism(mechanism, option or ())
        from diffattn.measure.watching import check_seen

        from ...seeing import at_work

        check_seen(chosen)
        pipe = opened(model, device, dtype)
        with quiet():
            figure = at_work(
                pipe, model, chosen, prompt, query, layer=layer, step=step, steps=steps, head=head, seed=seed
            )
    with written(output) as path:
        figure.savefig(path)
    typer.echo(f"wrote {output}")


def on_grid(mechanism: Any, grid: Any, query: str | None) -> Any:
    """A figure of the mask on a grid."""
    from diffattn.measure.watching import BY_CONTENT
    from diffattn.media.drawing import masks, plot_mask

    from ...arguments import parse_cell

    if mechanism.type not in masks():
        more = "; with --model it is drawn at work" if mechanism.type in BY_CONTENT else ""
        raise ValueError(
            f"{mechanism.type} is not a mask over the tokens; mechanisms that are: {', '.join(masks())}{more}"
        )
    middle = (grid.frames // 2, grid.height // 2, grid.width // 2)
    return plot_mask(mechanism, grid, middle if query is None else parse_cell(query, grid))
