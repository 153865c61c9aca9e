"""The command `diffattn summary`: what a swap would do to a model, without its weights."""

from pathlib import Path
from typing import Annotated

import typer

from ...frame import (
    Device,
    Dtype,
    Layers,
    Options,
    UnusedSeed,
    app,
    examples,
    output_option,
    quiet,
)


@app.command(
    epilog=examples(
        "diffattn summary tiny --mechanism clear -o radius=4",
        "diffattn summary black-forest-labs/FLUX.1-dev -o radius=16 --height 2048 --width 2048 --text-tokens 512",
        "diffattn summary ./my-unet --mechanism agent --layers 'up_blocks.*' --output summary.json",
    )
)
def summary(
    model: Annotated[
        str, typer.Argument(help="Hub id, folder, or tiny for the bundled pipeline; only its configs are read.")
    ],
    mechanism: Annotated[str, typer.Option(help="Short name, see `diffattn list`.")] = "clear",
    option: Options = None,
    layers: Layers = None,
    height: Annotated[
        int | None, typer.Option(min=1, help="Of the image, in pixels. Default: 1024, or the bundled pipeline's own.")
    ] = None,
    width: Annotated[int | None, typer.Option(min=1, help="Likewise.")] = None,
    frames: Annotated[int, typer.Option(min=1, help="Frames of the token grid, not of the video.")] = 1,
    text_tokens: Annotated[
        int,
        typer.Option(
            min=0, help="Text tokens in self-attention, such as Flux's 512; 0 where text has cross-attention."
        ),
    ] = 0,
    seed: UnusedSeed = 0,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    output: Annotated[Path | None, output_option("Also write the rows as JSON.")] = None,
) -> None:
    """Show what a swap would do to a model: every attention layer, its tokens, cost and kernel. Loads no weights."""
    import torch

    from diffattn.files.writing import write_json
    from diffattn.media.outputs import check_file

    from ...arguments import parse_device, parse_dtype, parse_mechanism
    from ...checkpoints import summarize

    if output is not None:
        check_file(output, overwrite=True)
    where = parse_device(device)
    like = torch.empty(0, device=where, dtype=parse_dtype(dtype, where))
    chosen = parse_mechanism(mechanism, option or ())
    with quiet(ours=True):
        parts = summarize(model, chosen, layers, height, width, frames, text_tokens, like)
    for part in parts:
        typer.echo(part.text)
    if output is not None:
        write_json(output, [part.to_dict() for part in parts])
        typer.echo(f"wrote {output}")
