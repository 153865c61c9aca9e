"""The command `diffattn inspect-star`: what the gates of a STAR checkpoint do."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Column, Table

from ..frame import Device, Dtype, Seed, app, examples, output_option, quiet


@app.command(
    "inspect-star",
    epilog=examples(
        "diffattn inspect-star star",
        "diffattn inspect-star light_deg.pt --timestep 100 --frames 8 --device cuda --output gates.json",
    ),
)
def inspect_star(
    checkpoint: Annotated[
        Path,
        typer.Argument(metavar="CHECKPOINT", help="Converted folder, or official .pt file."),
    ],
    timestep: Annotated[int, typer.Option(min=0, max=999, help="That the networks are told.")] = 500,
    frames: Annotated[int, typer.Option(min=1, help="Of the random clip.")] = 4,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    output: Annotated[Path | None, output_option("Also write the numbers as JSON.")] = None,
) -> None:
    """Show the range of every LIEM gate on a random clip, and how much the result changes without all of them.

    A gate acts on a token where it takes at least 30% off what the norm behind it gives back.
    """
    with quiet():
        from diffattn.pipelines.video_sr.gates import measure_gates
        from diffattn.pipelines.video_sr.run.opening import open_networks

    from diffattn.files.writing import write_json
    from diffattn.media.outputs import check_file

    from ..arguments import parse_device, parse_dtype

    if output is not None:
        check_file(output, overwrite=True)
    where = parse_device(device)
    with quiet():
        unet, controlnet = (network.to(where) for network in open_networks(checkpoint, parse_dtype(dtype, where)))
        report = measure_gates(unet, controlnet, timestep=timestep, frames=frames, seed=seed)
    table = Table("network", Column("module", overflow="fold"), "least", "mean", "most", "acts on")
    for row in report.rows:
        numbers = (f"{number:.4f}" for number in (row.low, row.mean, row.high))
        table.add_row(row.network, row.module, *numbers, f"{row.acting:.1%}")
    Console().print(table)
    typer.echo(f"relative change of the velocity without all gates: {report.change:.2e}")
    if output is not None:
        write_json(output, asdict(report))
        typer.echo(f"wrote {output}")
