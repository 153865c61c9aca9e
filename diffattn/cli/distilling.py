"""The commands `diffattn distill run | evaluate | cache | generate`: train a cheap attention, and judge it."""

from pathlib import Path
from typing import Annotated

import typer

from .frame import Device, Dtype, Seed, app, examples, output_option, quiet

distill = typer.Typer(
    rich_markup_mode="rich", no_args_is_help=True, help="Train a model to its cheap attention, and judge the result."
)
app.add_typer(distill, name="distill")

Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", "-s", metavar="NAME=VALUE", help="A field of the config, such as steps=500; repeatable."),
]


@distill.command(
    epilog=examples(
        "diffattn distill run --preset tiny",
        "diffattn distill run --preset tiny -s mechanism.radius=2 -s steps=500 --output outputs/radius-2",
        "diffattn distill run --config run.toml --resume auto",
        "accelerate launch -m diffattn.distill run --preset clear_flux_official -s data=./cache",
    )
)
def run(
    preset: Annotated[str | None, typer.Option(help="A named config: tiny, clear_flux_official.")] = None,
    config: Annotated[Path | None, typer.Option(help="JSON or TOML file; its fields go over the preset's.")] = None,
    set_: Overrides = None,
    resume: Annotated[str, typer.Option(help="auto: go on from the folder's last checkpoint; never.")] = "never",
    judge: Annotated[bool, typer.Option("--evaluate/--no-evaluate", help="Evaluate at the end.")] = True,
    output: Annotated[Path, output_option("Folder of the run.")] = Path("outputs/distill"),
) -> None:
    """Train a student by a preset or config file, export it as an adapter, and evaluate it."""
    import diffattn.distill.config as configs
    import diffattn.distill.run as running

    if preset is None and config is None:
        raise ValueError(f"name a --preset ({', '.join(configs.PRESETS)}) or a --config file")
    if resume not in ("auto", "never"):
        raise ValueError(f"--resume is auto or never, got {resume!r}")
    chosen = configs.preset(preset) if preset is not None else None
    if config is not None:
        chosen = configs.read_config(config, chosen)
    assert chosen is not None
    chosen = configs.override(chosen, set_ or ())
    with quiet():
        setting, outcome = running.train(chosen, output, resume=resume == "auto", progress=True)
    if not outcome.finished:
        typer.echo(f"stopped after {outcome.step} of {chosen.steps} steps; --resume auto goes on")
        return
    typer.echo(f"wrote {output / 'adapter'}; diffattn.load(pipe, {str(output / 'adapter')!r}) takes it")
    if judge:
        evaluate_and_say(setting, output)


@distill.command(epilog=examples("diffattn distill evaluate outputs/distill"))
def evaluate(
    folder: Annotated[Path, typer.Argument(help="Folder of a run.")],
    prompt: Annotated[list[str] | None, typer.Option(help="Repeatable. Default: held-out ones of the preset.")] = None,
    samples: Annotated[int, typer.Option(min=1, help="Held-out samples for the velocity error.")] = 32,
    output: Annotated[Path | None, output_option("Folder for the figures. Default: that of the run.")] = None,
) -> None:
    """Teacher, student and swap alone on the same inputs: velocity, attention, pictures."""
    import diffattn.distill.run as running

    with quiet():
        setting = running.open_run(folder)
    evaluate_and_say(setting, output or folder, prompt, samples)


def evaluate_and_say(setting: object, folder: Path, prompts: list[str] | None = None, samples: int = 32) -> None:
    """Evaluate, write and print."""
    import diffattn.distill.run as running
    from diffattn.distill.evaluate import markdown

    with quiet():
        evaluation, paths = running.evaluate_run(setting, folder, prompts, samples)
    typer.echo(markdown(evaluation))
    typer.echo("\n".join(f"wrote {path}" for path in paths))


@distill.command(
    epilog=examples("diffattn distill generate black-forest-labs/FLUX.1-dev prompts.txt --output pictures")
)
def generate(
    model: Annotated[str, typer.Argument(help="Hub id, folder, or tiny for the bundled pipeline.")],
    prompts: Annotated[Path, typer.Argument(help="File of prompts: one a line, or a JSON list.")],
    size: Annotated[str | None, typer.Option(help="HEIGHTxWIDTH in pixels. Default: the pipeline's own.")] = None,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    output: Annotated[Path, output_option("Folder for pictures and captions.")] = Path("outputs/pictures"),
) -> None:
    """Let the teacher make its own training pictures; goes on where it stopped."""
    from diffattn.distill.make_pictures import make_pictures, read_prompts

    from .arguments import parse_size
    from .checkpoints import native_call
    from .frame import opened

    texts = read_prompts(prompts)
    call = native_call(model)
    if size is not None:
        call["height"], call["width"] = parse_size(size)
    counts = make_pictures(opened(model, device, dtype), texts, output, seed=seed, call=call, progress=True)
    typer.echo(f"{counts} in {output}")


@distill.command(epilog=examples("diffattn distill cache black-forest-labs/FLUX.1-dev pictures --size 1024x1024"))
def cache(
    model: Annotated[str, typer.Argument(help="Hub id, folder, or tiny for the bundled pipeline.")],
    folder: Annotated[Path, typer.Argument(help="Folder of pictures with captions.")],
    size: Annotated[str, typer.Option(help="HEIGHTxWIDTH in pixels, of all of them.")],
    text_length: Annotated[int, typer.Option(min=1, help="Text tokens.")] = 512,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Encode pictures and captions once, in CLEAR's cache format; goes on where it stopped."""
    from diffattn.distill.cache import write_cache

    from .arguments import parse_size
    from .frame import opened

    sides = parse_size(size)
    counts = write_cache(
        opened(model, device, dtype),
        folder,
        size=sides,
        max_sequence_length=text_length,
        progress=True,
    )
    typer.echo(f"{counts} in {folder}")
