"""The command `diffattn estimate`: what a swap would gain, before any run."""

from pathlib import Path
from typing import Annotated

import typer

from ...frame import (
    Device,
    Dtype,
    Layers,
    Options,
    Threads,
    UnusedSeed,
    app,
    cpu_threads,
    examples,
    output_option,
    quiet,
)
from ...groups import Group, taken


@app.command(
    epilog=examples(
        "diffattn estimate tiny --mechanism routing -o share=0.2 --height 1024 --width 1024",
        "diffattn estimate black-forest-labs/FLUX.1-dev --mechanism clear -o radius=8 --height 2048 --card H100",
        "diffattn estimate ./wan --mechanism routing --reuse 2 --height 480 --width 832 --frames 81 --card A100",
    ),
    groups=[Group("diffattn.cli.swapping:Timing")],
)
def estimate(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="Hub id, folder, or tiny for the bundled pipeline.")],
    mechanism: Annotated[str, typer.Option(help="Short name, see `diffattn list`.")] = "routing",
    option: Options = None,
    layers: Layers = None,
    height: Annotated[
        int | None, typer.Option(min=1, help="In pixels. Default: 1024, or the bundled pipeline's own.")
    ] = None,
    width: Annotated[int | None, typer.Option(min=1, help="In pixels. Default: likewise.")] = None,
    frames: Annotated[int, typer.Option(min=1, help="Frames of a video.")] = 1,
    batch: Annotated[int, typer.Option(min=1, help="Samples in one call of the model; guidance makes two.")] = 1,
    steps: Annotated[int, typer.Option(min=1, help="Denoising steps, for --reuse and parts of a run.")] = 20,
    strength: Annotated[float, typer.Option(min=0.0, max=1.0, help="Of image-to-image: the share of them made.")] = 1.0,
    text_tokens: Annotated[int | None, typer.Option(min=0, help="Of the prompt. Default: the pipeline's.")] = None,
    card: Annotated[
        str | None,
        typer.Option(help="Model the times of this GPU from its data sheet; loads no weights. Default: measure here."),
    ] = None,
    threads: Threads = None,
    seed: UnusedSeed = 0,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    output: Annotated[Path | None, output_option("Also write the figures as JSON.")] = None,
) -> None:
    """Tell before any run what a swap would gain: work, share of attention, speed-up, memory, and from which size."""
    from dataclasses import asdict

    from diffattn.files.writing import write_json
    from diffattn.media.outputs import check_file

    from ...arguments import parse_device, parse_dtype
    from ...checkpoints import estimates
    from ...swapping import Swap

    if output is not None:
        check_file(output, overwrite=True)
    where = parse_device(device)
    timing = taken(context, "Timing")
    swap = Swap(mechanism, option or (), layers, timing)
    with cpu_threads(threads), quiet(ours=True):
        found = estimates(
            model,
            device=where,
            dtype=parse_dtype(dtype, where),
            height=height,
            width=width,
            frames=frames,
            batch=batch,
            num_inference_steps=steps,
            strength=strength,
            text_tokens=text_tokens,
            card=card,
            **swap.asked,
        )
    for one in found:
        typer.echo(one)
    if output is not None:
        values = [{**asdict(one), "grid": str(one.grid), "speedup": one.speedup} for one in found]
        typer.echo(f"wrote {write_json(output, values)}")
