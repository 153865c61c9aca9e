"""The commands: `diffattn demo | generate | summary | list | bench | mask`.

They read options, call the library and print; heavy modules are imported inside.
"""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from .frame import (
    Device,
    Dtype,
    Grid,
    Layers,
    Options,
    Seed,
    Threads,
    UnusedSeed,
    app,
    cpu_threads,
    examples,
    opened,
    output_option,
    quiet,
    whole,
)


@app.command(
    epilog=examples(
        "diffattn demo",
        "diffattn demo --radius 4 --prompt 'a red circle at the top' --output outputs/mine",
        "diffattn demo --model ./my-pipeline --prompt 'a lake' --steps 10 --device cuda",
    )
)
def demo(
    model: Annotated[
        str, typer.Option(help="Bundled pipeline (tiny), folder or hub id of a text-to-image pipeline.")
    ] = "tiny",
    prompt: Annotated[
        list[str] | None, typer.Option(help="Repeatable. Default: four that the bundled pipeline never saw.")
    ] = None,
    radius: Annotated[
        list[float] | None, typer.Option(min=1.0, help="Radius of CLEAR in tokens; repeatable. Default: 4 and 8.")
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Denoising steps. Default: the pipeline's own.")] = None,
    height: Annotated[int | None, typer.Option(min=1, help="In pixels. Default: the pipeline's own.")] = None,
    width: Annotated[int | None, typer.Option(min=1, help="In pixels. Default: the pipeline's own.")] = None,
    threads: Threads = None,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    output: Annotated[
        Path, output_option("Folder for sheet.png and demo.json; those of a former demo are replaced.")
    ] = Path("outputs/demo"),
) -> None:
    """Draw the same prompts by full and by cheap attention: one sheet of pictures, one table."""
    from ..outputs import check_folder
    from . import demo as demonstration
    from .checkpoints import locate, native_call
    from .generate import check_sides, makes_video

    check_folder(output)
    locate(model)
    prompts = prompt or demonstration.default_prompts(model)
    methods = demonstration.default_methods(whole(radius or (4, 8)))
    pipe = opened(model, device, dtype)
    if makes_video(pipe):
        raise ValueError(
            f"{type(pipe).__name__} makes videos, and the demonstration draws pictures; name another model"
        )
    check_sides(pipe, height, width)
    given = {"num_inference_steps": steps, "height": height, "width": width}
    call = {**native_call(model), **{key: value for key, value in given.items() if value is not None}}
    with quiet(ours=True), cpu_threads(threads or (1 if native_call(model) else None)):
        result = demonstration.run(pipe, prompts, methods, seed=seed, call=call, progress=True)
    sheet, numbers = demonstration.save(result, output)
    Console().print(demonstration.table(result))
    typer.echo("\n".join([*demonstration.remarks(result), f"wrote {sheet} and {numbers} in {result.elapsed:.0f} s"]))


@app.command(
    epilog=examples(
        "diffattn generate tiny --prompt 'a blue ring in the center' --mechanism clear -o radius=6 --compare",
        "diffattn generate black-forest-labs/FLUX.1-dev --prompt 'a lake' --mechanism clear -o radius=16",
        "diffattn generate black-forest-labs/FLUX.1-dev --prompt 'a lake' --adapter ./my-adapter --height 2048",
        "diffattn generate ./video-model --prompt waves --mechanism clear --swap-steps 4: --output waves.mp4",
        "diffattn generate tiny --prompt 'a red circle' --mechanism clear -o radius=8 --size 512x512 --compare",
        "torchrun --nproc-per-node 2 -m diffattn generate tiny --prompt 'a red circle' --mechanism clear -o radius=4 "
        "--parallel",
    )
)
def generate(
    model: Annotated[str, typer.Argument(help="Hub id, folder, or tiny for the bundled pipeline.")],
    prompt: Annotated[str, typer.Option(help="What to draw.")],
    mechanism: Annotated[
        str | None, typer.Option(help="Short name, see `diffattn list`. Default: the model's own attention.")
    ] = None,
    option: Options = None,
    layers: Layers = None,
    swap_steps: Annotated[
        str | None, typer.Option(metavar="SLICE", help="Denoising steps to swap, such as 4: or :10.")
    ] = None,
    backend: Annotated[str, typer.Option(help="Kernel, see `diffattn list`.")] = "auto",
    adapter: Annotated[
        str | None, typer.Option(help="Trained adapter: file, folder or hub id; it says its own mechanism.")
    ] = None,
    weight_name: Annotated[str | None, typer.Option(help="File of the adapter, where there are several.")] = None,
    compare: Annotated[
        bool, typer.Option("--compare", help="Also with the model's own attention; prints PSNR and times.")
    ] = False,
    negative_prompt: Annotated[str | None, typer.Option(help="What not to draw.")] = None,
    height: Annotated[int | None, typer.Option(min=1, help="In pixels.")] = None,
    width: Annotated[int | None, typer.Option(min=1, help="In pixels.")] = None,
    frames: Annotated[int | None, typer.Option(min=1, help="Frames of a video.")] = None,
    fps: Annotated[int, typer.Option(min=1, help="Frames a second in an .mp4 file.")] = 8,
    steps: Annotated[int | None, typer.Option(min=1, max=10_000, help="Denoising steps.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale.")] = None,
    num_images: Annotated[int | None, typer.Option(min=1, max=1000, help="Pictures of the same prompt.")] = None,
    size: Annotated[
        str | None,
        typer.Option(
            metavar="HEIGHTxWIDTH",
            help="In pixels, for a picture larger than those of training: drawn small by the model's own attention, "
            "then enlarged and drawn over in stages, by the mechanism or adapter.",
        ),
    ] = None,
    via: Annotated[
        int | None,
        typer.Option(min=1, help="With --size: longer side drawn first. Default: 1024, or the bundled pipeline's own."),
    ] = None,
    strength: Annotated[
        float | None, typer.Option(help="With --size: share of the steps that a stage makes, up to 1. Default: 0.7.")
    ] = None,
    growth: Annotated[
        float | None,
        typer.Option(help="With --size: factor by which a stage enlarges at most; inf: at once. Default: 2."),
    ] = None,
    parallel: Annotated[
        bool,
        typer.Option("--parallel", help="Rows of the picture shared out among the processes that torchrun started."),
    ] = False,
    offload: Annotated[bool, typer.Option("--offload", help="Keep on the GPU only the model that is at work.")] = False,
    overwrite: Annotated[
        bool,
        typer.Option("--overwrite", help="Replace videos and frames that are there; pictures are replaced anyway."),
    ] = False,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    output: Annotated[Path, output_option("Picture, video (.mp4, .mov, .mkv), or folder for frames.")] = Path(
        "outputs/picture.png"
    ),
) -> None:
    """Make pictures or a video with any model, by cheap attention or by its own."""
    from . import generate as making
    from .arguments import parse_steps
    from .checkpoints import native_call
    from .ranks import is_first, joined, own_device

    place = making.Place(output=output, count=num_images or 1, compare=compare, overwrite=overwrite)
    place.check()
    swap = making.Swap(
        mechanism, option or (), layers, parse_steps(swap_steps), backend, adapter, weight_name, parallel
    )
    if compare and not swap.wanted:
        raise ValueError("--compare needs something to compare: add --mechanism or --adapter")
    enlargement = making.Enlargement(size=size, via=via, strength=strength, growth=growth)
    request = making.Request(
        prompt=prompt,
        seed=seed,
        negative_prompt=negative_prompt,
        height=height,
        width=width,
        frames=frames,
        steps=steps,
        guidance=guidance,
        images=num_images,
    )
    enlargement.check(request)
    if compare and parallel:
        raise ValueError("--compare makes the picture twice, and --parallel shares one out: leave one of them out")
    with joined(parallel) as mesh:
        swap = replace(swap, mesh=mesh)
        pipe = opened(model, own_device(device) if parallel else device, dtype, offload)
        native = native_call(model)
        place.check_kind(pipe, *(enlargement.sides or (height, width)))
        if enlargement.size is not None:
            results, report = enlargement.make(pipe, request, swap, native)
        else:
            results, report = making.make_reported(pipe, request, swap, native)
    if not is_first():
        return
    if compare:
        full, lines = making.make_compared(pipe, request, enlargement, native, results)
        if enlargement.size is not None:
            report = [report[0], *(f"{swap}, {line}" for line in report[1:])]
        report += lines
        making.save(full, place.full, fps)
    typer.echo("\n".join([*report, *(f"wrote {path}" for path in making.save(results, output, fps))]))


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
        int | None, typer.Option(min=1, help="Of the picture, in pixels. Default: 1024, or the bundled pipeline's own.")
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

    from ..files import write_json
    from ..outputs import check_file
    from .arguments import parse_device, parse_dtype, parse_mechanism
    from .checkpoints import summarize

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
    from ..files import write_json
    from ..outputs import check_file
    from . import listing
    from .arguments import parse_device, parse_dtype

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

    from .. import bench as benchmark
    from ..outputs import check_folder
    from .arguments import parse_device, parse_dtype, parse_grid, parse_mechanism_text

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
    output: Annotated[Path, output_option("The picture, such as .png, .svg or .pdf.")] = Path("mask.png"),
) -> None:
    """Draw who sees whom under a mechanism on any grid, and the window of one query."""
    from ..draw import FIGURE_ENDINGS, masks, plot_mask
    from ..files import written
    from ..outputs import check_file
    from .arguments import parse_cell, parse_device, parse_dtype, parse_grid, parse_mechanism

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
