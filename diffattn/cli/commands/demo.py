"""The command `diffattn demo`: the same prompts and seeds by full and by efficient attention."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ..frame import (
    Device,
    Dtype,
    Seed,
    Threads,
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
    large: Annotated[
        int | None,
        typer.Option(
            min=0,
            metavar="SIDE",
            help="Pixels of a large image too, from a small one, by full attention and by routing; 0: none. "
            "Default: 1024 for the bundled pipeline, else none.",
        ),
    ] = None,
    threads: Threads = None,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    output: Annotated[
        Path,
        output_option("Folder for the sheets and demo.json; those of a former demo are replaced."),
    ] = Path("outputs/demo"),
) -> None:
    """Draw the same prompts by full and by efficient attention, small and large: sheets of images, one table."""
    from diffattn.measure.draws import makes_video
    from diffattn.media.outputs import check_folder

    from .. import demonstration
    from .. import large as enlarging
    from ..checkpoints import locate, native_call
    from ..generation import check_sides

    check_folder(output)
    locate(model)
    prompts = prompt or demonstration.default_prompts(model)
    methods = demonstration.default_methods(model, whole(radius or (4, 8)))
    pipe = opened(model, device, dtype)
    if makes_video(pipe):
        raise ValueError(f"{type(pipe).__name__} makes videos, and the demonstration draws images; name another model")
    check_sides(pipe, height, width)
    given = {"num_inference_steps": steps, "height": height, "width": width}
    call = {**native_call(model), **{key: value for key, value in given.items() if value is not None}}
    with quiet(ours=True), cpu_threads(threads or (1 if native_call(model) else None)):
        result = demonstration.run(pipe, prompts, methods, seed=seed, call=call, progress=True)
    Console().print(demonstration.table(result))
    typer.echo("\n".join(demonstration.remarks(result)))
    side = large if large is not None else enlarging.SIDE if native_call(model) else 0
    if side:
        typer.echo(f"now at {side} px, by full attention and by routing: a minute or two")
        number = next((number for number, text in enumerate(prompts) if "large" in text), 0)
        small = result.columns[0].pictures[number]
        zoom = side / small.height if native_call(model) else 1.0
        with quiet(ours=True), cpu_threads(threads):
            result.large = enlarging.run(pipe, prompts[number], small, side=side, zoom=zoom, seed=seed, call=call)
    files = " and ".join(map(str, demonstration.save(result, output)))
    typer.echo(f"wrote {files} in {result.elapsed:.0f} s")
    if result.large is not None:
        typer.echo("\n".join(result.large.lines))
