"""The command `diffattn bench`: attention kernels timed against full attention."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ...frame import (
    Device,
    Dtype,
    Seed,
    Threads,
    app,
    cpu_threads,
    examples,
    output_option,
    whole,
)


@app.command(
    epilog=examples(
        "diffattn bench",
        "diffattn bench --grid 64x64 --radius 8 --text 512 --heads 24 --head-dim 128 --dtype bfloat16 --device cuda",
        "diffattn bench --mechanism 'agent num_agents=256' --mechanism 'halo tile=8 radius=16'",
        "diffattn bench --grid 8x32x32 --radius 8 --mechanism agent --output outputs/video",
        "diffattn bench --scaling",
    )
)
def bench(
    grid: Annotated[
        list[str] | None,
        typer.Option(metavar="GRID", help="ROWSxCOLUMNS or FRAMESxROWSxCOLUMNS; repeatable. Default: 128x128."),
    ] = None,
    radius: Annotated[
        list[float] | None, typer.Option(min=1.0, help="Radius of CLEAR in tokens; repeatable. Default: 8 and 16.")
    ] = None,
    mechanism: Annotated[
        list[str] | None,
        typer.Option(metavar="'NAME OPTION=VALUE ...'", help="Other mechanisms; repeatable. Default: agent."),
    ] = None,
    backends: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Only these rows of CLEAR, see below; repeatable.")
    ] = None,
    heads: Annotated[int, typer.Option(min=1)] = 4,
    head_dim: Annotated[int, typer.Option(min=1)] = 64,
    text: Annotated[int, typer.Option(min=0, help="Text tokens before the grid.")] = 0,
    rounds: Annotated[int, typer.Option(min=1, help="Timed rounds; each runs everything once.")] = 7,
    threads: Threads = None,
    scaling: Annotated[
        bool, typer.Option("--scaling", help="Also time per token at twice the rows and columns.")
    ] = False,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Dtype = "float32",
    output: Annotated[
        Path, output_option("Folder for bench.json, bench.md and bench.png; former ones are replaced.")
    ] = Path("outputs/bench"),
) -> None:
    """Time attention kernels against full attention and against the official order, each beside its error.

    Rows of CLEAR: official (FlexAttention on row-major blocks, as released), row-major (the same blocks in our kernel,
    so that only the order differs), tile (in tile order, permutation included), tile-once (permuted before the clock
    starts), tiled (SDPA on gathered tiles, no compiler), dense (SDPA under a dense mask; on large grids only by name).

    A row whose error is too large gets no ratios, and the exit code is 1.
    """

    from diffattn.measure import bench as benchmark
    from diffattn.media.outputs import check_folder

    from ...arguments import parse_device, parse_dtype, parse_grid, parse_mechanism_text

    check_folder(output)
    where = parse_device(device)
    settings = benchmark.Settings(
        grids=tuple(parse_grid(text_, before=text) for text_ in grid or ["128x128"]),
        radii=whole(radius or (8, 16)),
        mechanisms=tuple(parse_mechanism_text(name) for name in mechanism or ["agent"]),
        rows=tuple(backends) if backends else None,
        heads=heads,
        head_dim=head_dim,
        rounds=rounds,
        seed=seed,
        device=where,
        dtype=parse_dtype(dtype, where),
        scaling=scaling,
    )
    with cpu_threads(threads):
        result = benchmark.run(settings, progress=True)
    paths = benchmark.save(result, output)
    console = Console()
    for table in benchmark.tables(result):
        console.print(table)
    typer.echo("\n".join([*(f"skipped: {text}" for text in result.skipped), *(f"wrote {path}" for path in paths)]))
    if not result.passed:
        raise typer.Exit(1)
