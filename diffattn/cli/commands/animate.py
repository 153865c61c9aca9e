"""The command `diffattn animate`: a picture of a person moved after a video of another by X-Portrait."""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from ..frame import Device, Dtype, Overwrite, Seed, app, complain, examples, output_option, quiet
from ..videos import bar, once, parse_rate

MODEL = "--checkpoint x-portrait"
DRIVING, FACES = "Driving video", "Faces"
FAILED = 1
MOST_FACES = 10
"""That MediaPipe looks for in a frame."""


@app.command(
    epilog=examples(
        f"diffattn animate person.jpg driving.mp4 {MODEL} --output person.mp4",
        f"diffattn animate person.png frames {MODEL} --fps 30000/1001 --frames 48 --preview look.mp4 --output out.mp4",
        f"diffattn animate person.jpg driving.mp4 {MODEL} --official --best-frame 36 --seed 999 --output out.mp4",
        f"diffattn animate person.jpg driving.mp4 {MODEL} --output person.mp4 --resume",
    )
)
def animate(
    source: Annotated[Path, typer.Argument(metavar="SOURCE", help="Picture of the person.")],
    driving: Annotated[Path, typer.Argument(metavar="DRIVING", help="Video of the movement, or folder of its frames.")],
    checkpoint: Annotated[Path, typer.Option(help="Folder of the converted X-Portrait checkpoint.")],
    output: Annotated[Path, output_option("Video, .mp4, .mov or .mkv; with the driving video's sound.")],
    preview: Annotated[
        Path | None, typer.Option(help="Also a video of source, landmarks, control pictures and result in a row.")
    ] = None,
    steps: Annotated[int, typer.Option(help="Denoising steps, from 1 to 1000.")] = 30,
    guidance: Annotated[float, typer.Option(help="Guidance scale; 1 for none.")] = 5.0,
    window: Annotated[int, typer.Option(help="Frames that are computed together.")] = 16,
    overlap: Annotated[int, typer.Option(help="Frames that neighbouring windows share.")] = 4,
    paste: Annotated[
        bool | None,
        typer.Option(
            "--paste/--no-paste",
            help="Animate a square around the face and put it back into the picture; or all of the picture, stretched "
            "to the networks' square, which the result keeps. Default: --paste, but for --official.",
        ),
    ] = None,
    official: Annotated[
        bool, typer.Option("--official", help="The released code's windows, which go round the end of the video.")
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with a run that was stopped, from its folder OUTPUT.work.")
    ] = False,
    overwrite: Overwrite = False,
    start: Annotated[int, typer.Option(min=0, help="First frame used.", rich_help_panel=DRIVING)] = 0,
    frames: Annotated[
        int | None, typer.Option(min=1, help="Most frames used. Default: all.", rich_help_panel=DRIVING)
    ] = None,
    skip: Annotated[
        int, typer.Option(min=0, help="Frames left out after each used; the rate falls.", rich_help_panel=DRIVING)
    ] = 0,
    fps: Annotated[
        str | None, typer.Option(help="Rate of a folder, such as 30000/1001. Default: 25.", rich_help_panel=DRIVING)
    ] = None,
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
    face: Annotated[
        int | None,
        typer.Option(
            min=0, help="Face of the driving video, from the left. Default: the largest.", rich_help_panel=FACES
        ),
    ] = None,
    no_face: Annotated[
        Literal["hold", "blank"],
        typer.Option(help="Frames without a face take the one before, or show none.", rich_help_panel=FACES),
    ] = "hold",
    scale_patches: Annotated[
        bool,
        typer.Option(
            "--scale-patches",
            help="Cut eyes and mouth out as large as the face is, not in one size.",
            rich_help_panel=FACES,
        ),
    ] = False,
    best_frame: Annotated[
        str,
        typer.Option(
            help="Frame, of those used, whose face is laid onto the source's; best for the nearest one, none to leave "
            "the frames as they are.",
            rich_help_panel=FACES,
        ),
    ] = "best",
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Animate a picture of a person after a video of another by X-Portrait.

    The result has as many frames as are used, and their rate. A stopped run goes on with --resume.

    The exit code is 1 where the run fails on the way, 2 where it cannot begin.
    """
    with quiet():  # diffusers and transformers speak of missing extras when they are imported
        import diffattn.pipelines.portrait_animation.run.animation as portrait
        from diffattn.media.clip import Clip, digest

    from ..arguments import parse_device, parse_dtype

    where = parse_device(device)
    number = parse_dtype(dtype, where)
    finder = open_finder(landmarks, provider, model)
    animation = portrait.Animation(
        source=source,
        driving=Clip(path=driving, start=start, count=frames, skip=skip, fps=parse_rate(fps), square=True),
        checkpoint=checkpoint,
        output=output,
        preview=preview,
        faces=f"{provider} {'' if model is None else digest(model)}" if landmarks is None else digest(landmarks),
        overwrite=overwrite,
        resume=resume,
        settings=portrait.Settings(
            steps=steps,
            guidance=guidance,
            seed=seed,
            window=window,
            overlap=overlap,
            best_frame=parse_best_frame(best_frame),
            face=face,
            no_face=no_face,
            scale_patches=scale_patches,
            paste=not official if paste is None else paste,
            official=official,
        ),
    )
    with quiet(), once(), animation.prepared(finder, where, number, bar) as run:
        run.pipe.set_progress_bar_config(disable=None, leave=False)
        try:
            run.write(run.denoise())
        except (ValueError, OSError, MemoryError, RuntimeError) as error:
            complain(RuntimeError(f"{error or 'out of memory'}; what is done is kept: go on with --resume"))
            raise typer.Exit(FAILED) from error
    typer.echo(str(output))


def parse_best_frame(text: str) -> int | Literal["best", "none"]:
    """`best`, `none`, or the number of a frame."""
    if text == "best":
        return "best"
    if text == "none":
        return "none"
    if not text.isdecimal():
        raise ValueError(f"--best-frame must be best, none or the number of a frame, got {text!r}")
    return int(text)


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
