"""The command `diffattn compare`: settings side by side, on the same prompts and seeds."""

from pathlib import Path
from typing import Annotated

import typer

from ...frame import Device, Dtype, Seed, Threads, app, cpu_threads, examples, opened, output_option, quiet


@app.command(
    epilog=examples(
        "diffattn compare tiny --prompts prompts.txt --setting 'routing quality=balanced' --setting 'clear radius=4'",
        "diffattn compare ./wan --prompts prompts.txt --frames 81 --setting 'routing share=0.3 reuse=2' "
        "--setting 'clear radius=8 pool=4 start=0.2' --setting recipe=recipe.json --resume",
    )
)
def compare(
    model: Annotated[str, typer.Argument(help="Hub id, folder, or tiny for the bundled pipeline.")],
    prompts: Annotated[Path, typer.Option(help="Text file with a prompt on each line.")],
    setting: Annotated[
        list[str],
        typer.Option(
            metavar="'NAME OPTION=VALUE ...'",
            help="A mechanism with its options and those of a swap (reuse, start, end, shares, layers, quality), or "
            "recipe=FILE; repeatable. Full attention is always there.",
        ),
    ],
    height: Annotated[int | None, typer.Option(min=1, help="In pixels.")] = None,
    width: Annotated[int | None, typer.Option(min=1, help="In pixels.")] = None,
    frames: Annotated[int | None, typer.Option(min=1, help="Frames of a video.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Denoising steps.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale.")] = None,
    lpips: Annotated[
        Path | None, typer.Option(help="Weights of AlexNet and of LPIPS in one .safetensors file: LPIPS too.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the comparison that --output holds.")] = False,
    threads: Threads = None,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    output: Annotated[
        Path, output_option("Folder for compare.md, compare.json, frontier.png, sheet.png and the images in runs.")
    ] = Path("outputs/compare"),
) -> None:
    """Draw every prompt under every setting: time, memory, what was computed, PSNR, SSIM, flicker, the frontier."""
    from diffattn.comparison import Setting, report
    from diffattn.comparison import compare as run
    from diffattn.comparison.opening import RUNS
    from diffattn.measure.lpips import Lpips
    from diffattn.media.outputs import check_folder

    from ...arguments import read_prompts
    from ...checkpoints import native_call
    from ...generation import Request

    check_folder(output)
    texts, settings = read_prompts(prompts), [Setting.parse(text) for text in setting]
    runs = output / RUNS
    if runs.exists() and any(runs.iterdir()) and not resume:
        raise ValueError(f"{runs} holds a comparison: add --resume to go on with it, or give another --output")
    distance = None if lpips is None else Lpips.load(lpips)
    request = Request(prompt="", seed=seed, height=height, width=width, frames=frames, steps=steps, guidance=guidance)
    pipe = opened(model, device, dtype, False)
    pipe.set_progress_bar_config(disable=True)
    call = request.arguments(pipe, native_call(model))
    call = {name: value for name, value in call.items() if name not in ("prompt", "generator")}
    with cpu_threads(threads), quiet(ours=True):
        found = run(pipe, texts, settings, seed=seed, folder=runs, lpips=distance, **call)
    paths = report.save(found, output, f"{model}, {len(texts)} prompts")
    typer.echo("\n".join([*report.table(found), *(f"wrote {path}" for path in paths)]))
