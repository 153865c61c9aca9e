"""The command `diffattn animate`: an image of a person moved after a video of another by X-Portrait."""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from ..around.leaving import leaving_record, video_sizes
from ..around.quiet import show_steps
from ..frame import Device, Dtype, Overwrite, Seed, Threads, app, complain, cpu_threads, examples, output_option, quiet
from ..groups import Group, taken
from ..videos import bar, once

MODEL = "--checkpoint x-portrait"
FACES = "Faces"
FAILED = 1
MOST_FACES = 10
"""That MediaPipe looks for in a frame."""


@app.command(
    epilog=examples(
        f"diffattn animate person.jpg driving.mp4 {MODEL} --output person.mp4",
        f"diffattn animate person.png frames {MODEL} --fps 30000/1001 --frames 48 --preview look.mp4 --output out.mp4",
        f"diffattn animate person.jpg driving.mp4 {MODEL} --official --best-frame 36 --seed 999 --output out.mp4",
        f"diffattn animate person.jpg driving.mp4 {MODEL} --output person.mp4 --resume",
    ),
    groups=[
        Group("diffattn.pipelines.portrait_animation.run.settings:Settings", also=["seed"]),
        Group("diffattn.media.clip:Clip", only_given=True),
    ],
    files=["config", "like"],
)
def animate(
    context: typer.Context,
    source: Annotated[Path, typer.Argument(metavar="SOURCE", help="Image of the person.")],
    driving: Annotated[Path, typer.Argument(metavar="DRIVING", help="Video of the movement, or folder of its frames.")],
    checkpoint: Annotated[Path, typer.Option(help="Folder of the converted X-Portrait checkpoint.")],
    output: Annotated[Path, output_option("Video, .mp4, .mov or .mkv; with the driving video's sound.")],
    preview: Annotated[
        Path | None, typer.Option(help="Also a video of source, landmarks, control images and result in a row.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue a run that was stopped, from its folder OUTPUT.work.")
    ] = False,
    overwrite: Overwrite = False,
    landmarks: Annotated[
        Path | None,
        typer.Option(
            help="Points from a .npy or .json file: the source's, then those of each frame used.", rich_help_panel=FACES
        ),
    ] = None,
    provider: Annotated[
        Literal["dlib", "mediapipe"], typer.Option(help="What finds the faces.", rich_help_panel=FACES)
    ] = "dlib",
    model: Annotated[
        Path | None, typer.Option(help="Its model file; MediaPipe needs one.", rich_help_panel=FACES)
    ] = None,
    threads: Threads = None,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Animate an image of a person after a video of another by X-Portrait.

    The result has as many frames as are used, and their rate. A stopped run continues with --resume.

    The exit code is 1 where the run fails on the way, 2 where it cannot begin.
    """
    from diffattn.files.records import check_record, path_beside

    with quiet():  # diffusers and transformers speak of missing extras when they are imported
        import diffattn.pipelines.portrait_animation.run.animation as portrait
        from diffattn.media.clip import Clip, digest

    from ..arguments import parse_device, parse_dtype

    where = parse_device(device)
    number = parse_dtype(dtype, where)
    finder = open_finder(landmarks, provider, model)
    animation = portrait.Animation(
        source=source,
        driving=Clip(path=driving, square=True, **taken(context, "Clip")),
        checkpoint=checkpoint,
        output=output,
        preview=preview,
        faces=f"{provider} {'' if model is None else digest(model)}" if landmarks is None else digest(landmarks),
        overwrite=overwrite,
        resume=resume,
        settings=taken(context, "Settings"),
    )
    check_record(path_beside(output), overwrite=overwrite)
    with cpu_threads(threads), quiet(), once(), animation.prepared(finder, where, number, bar) as run:
        show_steps(run.pipe)
        try:
            with leaving_record(context, path_beside(output), device, dtype) as made:
                run.write(run.denoise())
                made |= video_sizes(output)
        except (ValueError, OSError, MemoryError, RuntimeError) as error:
            complain(RuntimeError(f"{error or 'out of memory'}; what is done is kept: continue with --resume"))
            raise typer.Exit(FAILED) from error
    typer.echo(str(output))


def open_finder(landmarks: Path | None, provider: str, model: Path | None) -> Any:
    """What says where the faces are; raises `ValueError`, `ImportError` or `OSError` where it cannot."""
    if landmarks is not None:
        if model is not None:
            raise ValueError("--landmarks brings the points, so no --model is needed to find them: leave one out")
        from diffattn.pipelines.portrait_animation.face.detection import LandmarkFile

        return LandmarkFile(landmarks)
    if provider == "mediapipe":
        if model is None:
            raise ValueError("--provider mediapipe needs a model: add --model face_landmarker.task")
        from diffattn.pipelines.portrait_animation.face.with_mediapipe import MediapipeLandmarks

        return MediapipeLandmarks(model, MOST_FACES)
    from diffattn.pipelines.portrait_animation.face.with_dlib import DlibLandmarks

    return DlibLandmarks(model)
