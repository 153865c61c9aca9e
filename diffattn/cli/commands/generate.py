"""The command `diffattn generate`: pictures or a video with any model, by cheap attention or by its own."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from ..frame import (
    Device,
    Dtype,
    Layers,
    Options,
    Seed,
    app,
    examples,
    opened,
    output_option,
)


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
    from .. import generation as making
    from ..arguments import parse_steps
    from ..checkpoints import native_call
    from ..ranks import is_first, joined, own_device

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
