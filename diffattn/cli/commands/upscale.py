"""The command `diffattn upscale`: images in files restored, enlarged, stylized or colorized by PASD."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from ..around.leaving import leaving_record
from ..around.quiet import show_steps
from ..frame import Device, Dtype, Layers, Options, Seed, Threads, app, cpu_threads, examples, output_option, quiet
from ..groups import Group, taken

MODELS = "--checkpoint pasd/checkpoint-100000 --base ./sd15"


@app.command(
    epilog=examples(
        "diffattn upscale photo.jpg --checkpoint pasd --base stable-diffusion-v1-5/stable-diffusion-v1-5",
        f"diffattn upscale scans 'more/*.png' {MODELS} --scale 2 --prompt 'a harbour' --compare --output restored",
        f"diffattn upscale old.png {MODELS} --colorize --format png",
        f"diffattn upscale portrait.png {MODELS} --scale 1 --stylize ./cartoon.safetensors --style-weight 0.8",
    ),
    groups=[Group("diffattn.pipelines.pixel_aware_sr.run.command:Restoration", also=["seed"])],
    files=["config", "like"],
)
def upscale(
    context: typer.Context,
    inputs: Annotated[list[str], typer.Argument(metavar="INPUT...", help="Files, folders, patterns such as '*.png'.")],
    checkpoint: Annotated[Path, typer.Option(help="Folder of a PASD checkpoint, with unet and controlnet in it.")],
    base: Annotated[
        str, typer.Option(metavar="MODEL", help="Folder or hub id of its base model: Stable Diffusion 1.5, or SDXL.")
    ],
    stylize: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="Folder, hub id or .safetensors file of a model in the base's place."),
    ] = None,
    style_weight: Annotated[
        float | None, typer.Option(help="With --stylize: share of its U-Net, from 0 to 1. Default: 1.")
    ] = None,
    lora: Annotated[Path | None, typer.Option(help="LoRA for the base model, a .safetensors file.")] = None,
    mechanism: Annotated[
        str | None, typer.Option(help="Short name, see `diffattn list`. Default: the model's own attention.")
    ] = None,
    option: Options = None,
    layers: Layers = None,
    compare: Annotated[
        bool, typer.Option("--compare", help="Also NAME-compare.png: input, enlarged bicubically, and result.")
    ] = False,
    format_: Annotated[
        Literal["png", "jpg", "webp"] | None,
        typer.Option("--format", help="Default: that of the input where it can be written, else png."),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Make what is there anew; without it whole images are skipped.")
    ] = False,
    threads: Threads = None,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    output: Annotated[Path, output_option("Folder of the results, named as the inputs.")] = Path("outputs/upscaled"),
) -> None:
    """Restore and enlarge images by PASD; or stylize or colorize them.

    Opacity and colour profile are kept, images are turned as EXIF says, 16 bits a channel become 8.

    The exit code is 1 where an image failed; the others are made all the same.
    """
    with quiet():  # diffusers and transformers speak of missing extras when they are imported
        import diffattn.pipelines.pixel_aware_sr.run.batch as batch
        import diffattn.pipelines.pixel_aware_sr.run.command as pasd

    from ..arguments import parse_device, parse_dtype, parse_mechanism
    from ..checkpoints import locate
    from ..swapping import Swap

    restoration = taken(context, "Restoration")
    networks = pasd.Networks(
        checkpoint=checkpoint,
        base=locate(base),
        stylize=None if stylize is None else locate(stylize),
        style_weight=style_weight,
        lora=lora,
    )
    swap, where = Swap(mechanism, option or (), layers), parse_device(device)
    number = parse_dtype(dtype, where)
    if mechanism is not None:
        parse_mechanism(mechanism, option or ())  # wrong options are told before the networks are opened
    jobs = batch.plan_jobs(inputs, output, ending=format_ and f".{format_}", sheets=compare)
    batch.check_records(jobs, overwrite)
    with cpu_threads(threads), quiet():
        pipe = networks.open(where, number)
        show_steps(pipe)
        swap.put(pipe)
        tally = batch.run_jobs(
            jobs,
            lambda picture: restoration.restore(pipe, picture),
            factor=restoration.factor,
            overwrite=overwrite,
            recording=lambda job: leaving_record(context, job.record, device, dtype, inputs=[job.source]),
        )
    typer.echo(str(tally))
    if tally.failed:
        raise typer.Exit(1)
