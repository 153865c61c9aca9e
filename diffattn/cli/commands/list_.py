"""The command `diffattn list`: mechanisms, model families, kernels."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ..frame import (
    Device,
    Dtype,
    UnusedSeed,
    app,
    examples,
    output_option,
)


@app.command(
    name="list",
    epilog=examples(
        "diffattn list", "diffattn list --device cuda --dtype bfloat16", "diffattn list --output what.json"
    ),
)
def list_(
    seed: UnusedSeed = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    output: Annotated[Path | None, output_option("Also write the lists as JSON.")] = None,
) -> None:
    """List mechanisms with their options, model families, and the kernels that run here (device and dtype count)."""
    from diffattn.files.writing import write_json
    from diffattn.media.outputs import check_file

    from .. import listing
    from ..arguments import parse_device, parse_dtype

    if output is not None:
        check_file(output, overwrite=True)
    where = parse_device(device)
    found = listing.everything(where, parse_dtype(dtype, where))
    console = Console()
    for table in listing.tables(found):
        console.print(table)
    if output is not None:
        write_json(output, found)
        typer.echo(f"wrote {output}")
