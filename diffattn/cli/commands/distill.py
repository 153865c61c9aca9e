"""The commands `diffattn distill run | evaluate | export | cache | generate`: train efficient attention, judge it."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from ..frame import App, Device, Dtype, Options, Seed, app, examples, output_option, quiet
from ..ranks import is_first, own_device

distill = App(
    rich_markup_mode="rich",
    no_args_is_help=True,
    help="Train a model to its efficient attention, and judge the result.",
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
        "diffattn distill run --preset tiny --mechanism routing -o top_k=4 -o tile=2 -o pool=2",
        "diffattn distill run --preset tiny_video --output outputs/video",
        "diffattn distill run --config run.toml --resume auto",
        "accelerate launch -m diffattn.distill run --preset clear_flux_official --data cache",
        "torchrun --nproc-per-node 8 -m diffattn.distill run --config run.toml --data cache -s sharded=true",
    ),
    files=[],  # its config is that of the run
)
def run(
    preset: Annotated[str | None, typer.Option(help="A named config: tiny, tiny_video, clear_flux_official.")] = None,
    config: Annotated[Path | None, typer.Option(help="JSON or TOML file; its fields override the preset's.")] = None,
    data: Annotated[
        str | None,
        typer.Option(help="Folder made by `diffattn distill cache`; shapes or moving: a bundled pipeline's own world."),
    ] = None,
    mechanism: Annotated[
        str | None, typer.Option(help="Short name, see `diffattn list`. Default: the config's.")
    ] = None,
    option: Options = None,
    set_: Overrides = None,
    resume: Annotated[str, typer.Option(help="auto: go on from the folder's last checkpoint; never.")] = "never",
    judge: Annotated[bool, typer.Option("--evaluate/--no-evaluate", help="Evaluate at the end.")] = True,
    output: Annotated[Path, output_option("Folder of the run.")] = Path("outputs/distill"),
) -> None:
    """Train a student by a preset or config file, export it as an adapter, and evaluate it."""
    import diffattn.distill.config as configs
    import diffattn.distill.run as running
    from diffattn.parallel.operations.collectives import leave_group

    from ..arguments import parse_mechanism

    if preset is None and config is None:
        raise ValueError(f"name a --preset ({', '.join(configs.PRESETS)}) or a --config file")
    if option and mechanism is None:
        raise ValueError("-o is for an option of --mechanism; one of the config's mechanism is -s mechanism.NAME=VALUE")
    if resume not in ("auto", "never"):
        raise ValueError(f"--resume is auto or never, got {resume!r}")
    chosen = configs.preset(preset) if preset is not None else None
    if config is not None:
        chosen = configs.read_config(config, chosen)
    assert chosen is not None
    given = [] if data is None else [f"data={data}"]
    if mechanism is not None:
        chosen = replace(chosen, mechanism=parse_mechanism(mechanism, option or ()))
    chosen = configs.override(chosen, [*given, *(set_ or ())])
    with quiet():
        runs = running.divided(chosen, output)
        for folder, own in runs.items():
            setting = None  # lets the model of the run before go
            setting, outcome = trained(own, folder, resume == "auto")
            if not outcome.finished:
                break
        leave_group()
    if setting is None and not is_first():
        return  # the first process says and judges
    if not outcome.finished:
        typer.echo(f"stopped {folder} after {outcome.step} of {chosen.steps} steps; --resume auto continues")
        return
    for folder in runs:
        adapter = folder / "adapter"
        typer.echo(f"wrote {adapter}; diffattn.load(pipe, {str(adapter)!r}) takes it")
        if judge:
            evaluate_and_say(setting if len(runs) == 1 else running.open_run(folder), folder)


def trained(config: Any, folder: Path, resume: bool) -> tuple[Any, Any]:
    """`train`, whose failures that settings are to blame for are one line."""
    import diffattn.distill.run as running

    try:
        return running.train(config, folder, resume=resume, progress=True)
    except FloatingPointError as error:
        raise ValueError(str(error)) from error
    except RuntimeError as error:  # torch's class for this as well
        if "memory" not in str(error):
            raise
        why = str(error).splitlines()[0]
        raise MemoryError(f"this run does not fit into memory: {why}; use a smaller batch or more parts") from error


@distill.command(
    epilog=examples(
        "diffattn distill evaluate outputs/distill",
        "diffattn distill evaluate outputs/distill --set mechanism.radius=3",
        "diffattn distill evaluate outputs/distill --set data=held-out --prompt 'a fox' --clip-model clip-vit-l-14",
    )
)
def evaluate(
    folder: Annotated[Path, typer.Argument(help="Folder of a run.")],
    prompt: Annotated[list[str] | None, typer.Option(help="Repeatable. Default: held-out ones of the preset.")] = None,
    samples: Annotated[int, typer.Option(min=1, help="Held-out samples for the velocity error.")] = 32,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            "-s",
            metavar="NAME=VALUE",
            help="The trained weights under another option, such as mechanism.radius=3, or data=FOLDER; repeatable.",
        ),
    ] = None,
    rounds: Annotated[int, typer.Option(min=0, help="How often each model's forward is timed; 0: not at all.")] = 5,
    lpips_weights: Annotated[Path | None, typer.Option(help="File with torchvision's AlexNet, for LPIPS.")] = None,
    clip_model: Annotated[Path | None, typer.Option(help="Folder of a CLIP model, for the CLIP scores.")] = None,
    frechet_model: Annotated[
        Path | None, typer.Option(help="Folder of an image model such as DINOv2, for the Frechet distance.")
    ] = None,
    device: Device = "auto",
    output: Annotated[
        Path | None, output_option("Folder for the figures. Default: the run's, with --set one below it.")
    ] = None,
) -> None:
    """Teacher, student and swap alone on the same inputs: velocity, attention, time, images."""
    import diffattn.distill.evaluation.picture_metrics as picture_metrics
    import diffattn.distill.run as running

    from ..arguments import parse_device

    where = parse_device(device)
    with quiet():
        metrics = picture_metrics.open_metrics(
            lpips=lpips_weights, clip=clip_model, frechet=frechet_model, device=where
        )
        setting = running.open_run(folder, where, set_ or ())
    target = output or (folder / "evaluations" / named_by(set_) if set_ else folder)
    evaluate_and_say(setting, target, prompt, samples, metrics=metrics, rounds=rounds)


def named_by(options: list[str]) -> str:
    """A folder's name that tells some NAME=VALUE options."""
    return re.sub(r"[^\w.=,-]+", "_", ",".join(options))


def evaluate_and_say(
    setting: Any, folder: Path, prompts: list[str] | None = None, samples: int = 32, **options: Any
) -> None:
    """Evaluate, write and print."""
    import diffattn.distill.evaluation.page as evaluation_page
    import diffattn.distill.run as running

    with quiet():
        evaluation, paths = running.evaluate_run(setting, folder, prompts, samples, **options)
    typer.echo(evaluation_page.markdown(evaluation))
    typer.echo("\n".join(f"wrote {path}" for path in paths))


@distill.command(
    epilog=examples(
        "diffattn distill export outputs/distill --output clear-16",
        "diffattn distill export outputs/distill --output clear-16 --push-to-hub --repo-id me/clear-16",
    )
)
def export(
    folder: Annotated[Path, typer.Argument(help="Folder of a run.")],
    push_to_hub: Annotated[bool, typer.Option("--push-to-hub", help="Upload the folder to the model hub.")] = False,
    repo_id: Annotated[str | None, typer.Option(metavar="OWNER/NAME", help="Where to, on the hub.")] = None,
    output: Annotated[Path | None, output_option("Folder to write. Default: adapter in that of the run.")] = None,
) -> None:
    """Write a run's student as a folder to share: weights, and a card with its evaluation and images."""
    import diffattn.distill.run as running

    if repo_id is not None and not push_to_hub:
        raise ValueError(f"--repo-id {repo_id} goes with --push-to-hub: give both, or none")
    target = output or folder / "adapter"
    with quiet():
        file = running.export_run(folder, target, push_to_hub=push_to_hub, repo_id=repo_id)
    typer.echo(f"wrote {file} and its card; diffattn.load(pipe, {str(target)!r}) takes it")
    if push_to_hub:
        typer.echo(f"uploaded to {repo_id}; diffattn.load(pipe, {repo_id!r}) takes it")


@distill.command(
    epilog=examples(
        "diffattn distill generate black-forest-labs/FLUX.1-dev prompts.txt --output images",
        "diffattn distill generate Wan-AI/Wan2.1-T2V-1.3B-Diffusers prompts.txt --frames 81 --output clips",
    )
)
def generate(
    model: Annotated[str, typer.Argument(help="Hub id, folder, or tiny or tiny:wan for a bundled pipeline.")],
    prompts: Annotated[Path, typer.Argument(help="File of prompts: one a line, or a JSON list.")],
    size: Annotated[str | None, typer.Option(help="HEIGHTxWIDTH in pixels. Default: the pipeline's own.")] = None,
    frames: Annotated[
        int | None, typer.Option(min=1, help="Frames of a video model's clips. Default: 1, an image; of tiny:wan 33.")
    ] = None,
    fps: Annotated[str, typer.Option(help="Frames a second of the clips' files.")] = "16",
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    output: Annotated[Path, output_option("Folder for images or clips and captions.")] = Path("outputs/pictures"),
) -> None:
    """Let the teacher make its own training images, or clips; goes on where it stopped.

    Several processes, by torchrun or accelerate launch, share the work.
    """
    import diffattn.distill.data.make_pictures as making
    import diffattn.distill.data.pictures as pictures

    from ..arguments import parse_rate, parse_size
    from ..checkpoints import native_call
    from ..frame import opened

    rank, world = pictures.own_place()
    texts = making.read_prompts(prompts)
    call = native_call(model)
    if size is not None:
        call["height"], call["width"] = parse_size(size)
    if frames is not None:
        call["num_frames"] = frames
    rate = parse_rate(fps)
    pipe = opened(model, own_device(device), dtype)
    counts = making.make_pictures(
        pipe, texts, output, seed=seed, call=call, fps=rate, rank=rank, world=world, progress=rank == 0
    )
    typer.echo(f"{counts} in {output}{of_process(rank, world)}")


def of_process(rank: int, world: int) -> str:
    """For the end of a message."""
    return f", process {rank} of {world}" if world > 1 else ""


@distill.command(
    epilog=examples(
        "diffattn distill cache black-forest-labs/FLUX.1-dev images --size 1024x1024",
        "diffattn distill cache MODEL images --size 1024x1024 --shards 'data-{000..009}.tar'",
        "diffattn distill cache Wan-AI/Wan2.1-T2V-1.3B-Diffusers clips --size 480x832 --frames 81 --fps 16",
        "torchrun --nproc-per-node 4 -m diffattn.distill cache MODEL images --size 1024x1024",
    )
)
def cache(
    model: Annotated[str, typer.Argument(help="Hub id, folder, or tiny or tiny:wan for a bundled pipeline.")],
    folder: Annotated[Path, typer.Argument(help="Folder of images or videos with captions.")],
    size: Annotated[str, typer.Option(help="HEIGHTxWIDTH in pixels, of all of them.")],
    frames: Annotated[
        int | None,
        typer.Option(help="Take videos, and so many frames of each, from its beginning. Default: take images."),
    ] = None,
    stride: Annotated[int, typer.Option(min=1, help="Take every so many frames of a video.")] = 1,
    fps: Annotated[
        str | None, typer.Option(help="Take so many frames of a second instead, of videos that have them.")
    ] = None,
    text_length: Annotated[int | None, typer.Option(min=1, help="Text tokens. Default: the pipeline's own.")] = None,
    shards: Annotated[
        list[str] | None,
        typer.Option(help="Webdataset shards such as 'data-{000..009}.tar', unpacked to FOLDER first; repeatable."),
    ] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Encode images or clips and captions once, Flux's in CLEAR's format; goes on where it stopped.

    Several processes, by torchrun or accelerate launch, share the work.
    """
    import diffattn.distill.data.cache as caching
    import diffattn.distill.data.clips as clips
    import diffattn.distill.data.pictures as pictures

    from ..arguments import parse_rate, parse_size
    from ..checkpoints import native_call
    from ..frame import opened

    if frames is None and (stride != 1 or fps is not None):
        raise ValueError("--stride and --fps choose frames of videos: give --frames, which says how many, as well")
    sides, rate = parse_size(size), None if fps is None else parse_rate(fps)
    cut = None if frames is None else clips.Cut(frames=frames, stride=stride, fps=rate)
    rank, world = pictures.own_place()
    if shards:
        endings = pictures.ENDINGS if cut is None else pictures.CLIP_ENDINGS
        pictures.unpack_shards(pictures.find_shards(shards), folder, endings=endings, rank=rank, world=world)
    # Before the pipeline is opened, which takes long.
    (pictures.find_pictures if cut is None else clips.find_clips)(folder, told=False)
    counts = caching.write_cache(
        opened(model, own_device(device), dtype),
        folder,
        size=sides,
        cut=cut,
        max_sequence_length=text_length or native_call(model).get("max_sequence_length"),
        rank=rank,
        world=world,
        progress=rank == 0,
    )
    typer.echo(f"{counts} in {folder}{of_process(rank, world)}")
