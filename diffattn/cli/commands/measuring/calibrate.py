"""The command `diffattn calibrate`: a recipe for a model, by a fidelity or a budget."""

from pathlib import Path
from typing import Annotated

import typer

from ...frame import Device, Dtype, Layers, Seed, app, examples, opened, output_option


@app.command(
    epilog=examples(
        "diffattn calibrate tiny --prompts prompts.txt --target 38 --output recipe.json",
        "diffattn calibrate black-forest-labs/FLUX.1-dev --prompts prompts.txt --share 0.3 --height 2048 --width 2048 "
        "--mechanism 'routing share=0.3' --mechanism 'clear radius=16 pool=4' --work outputs/calibration",
        "diffattn calibrate tiny --prompts prompts.txt --share 0.5 --by-head --mechanism 'clear radius=2 pool=2' "
        "--mechanism 'clear radius=5 pool=2'",
        "diffattn generate tiny --prompt 'a red circle' --recipe recipe.json --compare",
    )
)
def calibrate(
    model: Annotated[str, typer.Argument(help="Hub id, folder, or tiny for the bundled pipeline.")],
    prompts: Annotated[Path, typer.Option(help="Text file with a prompt on each line; eight or more.")],
    target: Annotated[float | None, typer.Option(help="PSNR in dB that the median of the prompts is to have.")] = None,
    share: Annotated[float | None, typer.Option(help="Or: of full attention's operations, at most.")] = None,
    mechanism: Annotated[
        list[str] | None,
        typer.Option(
            metavar="'NAME OPTION=VALUE ...'",
            help="What may be chosen beside full attention; repeatable. Default: routing at five shares, clear with "
            "means.",
        ),
    ] = None,
    reuse: Annotated[
        list[int] | None, typer.Option(min=1, help="Steps that an output may serve; repeatable. Default: 1, 2 and 3.")
    ] = None,
    parts: Annotated[int, typer.Option(min=1, help="Equal parts of the run, each with a choice of its own.")] = 3,
    by_head: Annotated[
        bool, typer.Option("--by-head", help="A mechanism for every head, the same in all steps; with --share.")
    ] = False,
    layers: Layers = None,
    height: Annotated[int | None, typer.Option(min=1, help="In pixels.")] = None,
    width: Annotated[int | None, typer.Option(min=1, help="In pixels.")] = None,
    frames: Annotated[int | None, typer.Option(min=1, help="Frames of a video.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Denoising steps.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale.")] = None,
    work: Annotated[
        Path | None, typer.Option(help="Folder that keeps what was measured; a calibration that stopped goes on there.")
    ] = None,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    output: Annotated[Path, output_option("The recipe, a JSON file.")] = Path("outputs/recipe.json"),
) -> None:
    """Find which attention each layer needs in each part of a run, for a fidelity or a budget: a recipe."""
    from diffattn.calibration import calibrate as find
    from diffattn.calibration.heads import summary_of
    from diffattn.media.outputs import check_file

    from ...arguments import parse_mechanism_text, read_prompts
    from ...checkpoints import native_call
    from ...generation import Request

    check_file(output, overwrite=True)
    if by_head and (share is None or target is not None or mechanism is None or reuse or parts != 3 or work):
        raise ValueError(
            "--by-head takes a budget, --share, and what may be chosen, --mechanism; it has no --target, --reuse, "
            "--parts and --work"
        )
    texts = read_prompts(prompts)
    chosen = None if mechanism is None else [parse_mechanism_text(text) for text in mechanism]
    request = Request(prompt="", seed=seed, height=height, width=width, frames=frames, steps=steps, guidance=guidance)
    pipe = opened(model, device, dtype, False)
    call = request.arguments(pipe, native_call(model))
    call = {name: value for name, value in call.items() if name not in ("prompt", "generator")}
    if by_head:
        from diffattn.calibration import calibrate_heads

        found = calibrate_heads(pipe, texts, chosen or (), share=share or 0.0, layers=layers, seed=seed, **call)
        typer.echo(f"{found}\n{summary_of(found)}\nwrote {found.save(output)}")
        return
    recipe = find(
        pipe,
        texts,
        target=target,
        share=share,
        mechanisms=chosen,
        reuse=tuple(reuse or (1, 2, 3)),
        parts=parts,
        layers=layers,
        seed=seed,
        folder=work,
        **call,
    )
    typer.echo(f"{recipe}\n{summary_of(recipe)}\nwrote {recipe.save(output)}")
