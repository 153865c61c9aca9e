"""The command `diffattn generate`: images or a video with any model, by efficient attention or by its own."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from ..around.leaving import leaving_record
from ..frame import (
    Device,
    Dtype,
    Layers,
    Options,
    Seed,
    Threads,
    app,
    cpu_threads,
    examples,
    opened,
    output_option,
)
from ..groups import Group, taken


@app.command(
    epilog=examples(
        "diffattn generate tiny --prompt 'a blue ring in the center' --mechanism clear -o radius=6 --compare",
        "diffattn generate black-forest-labs/FLUX.1-dev --prompt 'a lake' --mechanism clear -o radius=16",
        "diffattn generate black-forest-labs/FLUX.1-dev --prompt 'a lake' --adapter ./my-adapter --height 2048",
        "diffattn generate tiny --prompt 'a red circle' --mechanism routing -o share=0.5 -o tile=2 -o pool=2 --reuse 2",
        "diffattn generate ./video-model --prompt waves --mechanism clear --start 0.2 --output waves.mp4",
        "diffattn generate tiny --prompt 'a red circle' --mechanism clear -o radius=8 --size 512x512 --compare",
        "diffattn generate --like outputs/picture.json -o radius=4 --output outputs/nearer.png",
        "torchrun --nproc-per-node 2 -m diffattn generate tiny --prompt 'a red circle' --mechanism clear -o radius=4 "
        "--parallel",
    ),
    groups=[
        Group("diffattn.cli.generation:Request", also=["seed"]),
        Group("diffattn.cli.generation:Enlargement"),
        Group("diffattn.cli.swapping:Timing"),
    ],
    files=["config", "like"],
)
def generate(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="Hub id, folder, or tiny for the bundled pipeline.")],
    mechanism: Annotated[
        str | None, typer.Option(help="Short name, see `diffattn list`. Default: the model's own attention.")
    ] = None,
    option: Options = None,
    layers: Layers = None,
    backend: Annotated[str, typer.Option(help="Kernel, see `diffattn list`.")] = "auto",
    adapter: Annotated[
        str | None, typer.Option(help="Trained adapter: file, folder or hub id; it says its own mechanism.")
    ] = None,
    weight_name: Annotated[str | None, typer.Option(help="File of the adapter, where there are several.")] = None,
    recipe: Annotated[
        str | None, typer.Option(help="Recipe of `diffattn calibrate`: a JSON file; it says its own mechanisms.")
    ] = None,
    compare: Annotated[
        bool,
        typer.Option(
            "--compare",
            help="Also with the model's own attention, into NAME-full; prints PSNR and times, and draws strips of a "
            "video into NAME-strips.png.",
        ),
    ] = False,
    fps: Annotated[int, typer.Option(min=1, help="Frames a second in an .mp4 file.")] = 8,
    parallel: Annotated[
        bool,
        typer.Option("--parallel", help="Rows of the image split among the processes that torchrun started."),
    ] = False,
    offload: Annotated[bool, typer.Option("--offload", help="Keep on the GPU only the model that is at work.")] = False,
    overwrite: Annotated[
        bool,
        typer.Option(
            "--overwrite",
            help="Replace videos, frames and JSON files of others that are there; images are replaced anyway.",
        ),
    ] = False,
    threads: Threads = None,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    output: Annotated[Path, output_option("Image, video (.mp4, .mov, .mkv), or folder for frames.")] = Path(
        "outputs/picture.png"
    ),
) -> None:
    """Make images or a video with any model, by efficient attention or by its own.

    What made it stands in a JSON file beside it: `diffattn generate --like FILE` makes the same.
    """
    from diffattn.files.records import check_record, path_beside

    from .. import generation as making
    from ..checkpoints import native_call
    from ..places import Frames, Place, save
    from ..ranks import is_first, joined, own_device
    from ..swapping import Swap

    request, enlargement = taken(context, "Request"), taken(context, "Enlargement")
    typed = str(getattr(context.get_parameter_source("output"), "name", "")) == "COMMANDLINE"
    place = Place(output=output, count=request.images or 1, compare=compare, overwrite=overwrite, typed=typed)
    place.check()
    check_record(path_beside(output), overwrite=overwrite)
    timing = taken(context, "Timing")
    swap = Swap(mechanism, option or (), layers, timing, backend, adapter, weight_name, recipe, parallel)
    if compare and not swap.wanted:
        raise ValueError("--compare needs something to compare: add --mechanism, --adapter or --recipe")
    enlargement.check(request)
    if compare and parallel:
        raise ValueError("--compare makes the image twice, and --parallel splits one: leave one of them out")
    with cpu_threads(threads):
        with joined(parallel) as mesh:
            swap = replace(swap, mesh=mesh)
            pipe = opened(model, own_device(device) if parallel else device, dtype, offload)
            native = native_call(model)
            place.check_kind(pipe, *(enlargement.sides or (request.height, request.width)))
            if enlargement.size is not None:
                results, report = enlargement.make(pipe, request, swap, native)
            else:
                results, report = making.make_reported(pipe, request, swap, native)
        if not is_first():
            return
        full: list[Frames] = []
        if compare:
            full, lines = making.make_compared(pipe, request, enlargement, native, results)
            if enlargement.size is not None:
                report = [report[0], *(f"{swap}, {line}" for line in report[1:])]
            report += lines
        with leaving_record(context, path_beside(output), device, dtype) as made:
            if compare:
                made["full"] = [path.name for path in save(full, place.full, fps)]
                report += place.save_strips(making.make_strips(results, full, str(swap)))
            written = save(results, output, fps)
            report += [f"wrote {output.with_name(name)}, by the model's own attention" for name in made.get("full", ())]
            made |= {"files": written, **making.sizes(results)}
    typer.echo("\n".join([*report, *(f"wrote {path}" for path in written)]))
