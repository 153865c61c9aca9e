"""Every mechanism without training, on the bundled pipelines: `docs/numbers.md` and `docs/numbers.json`.

    python scripts/numbers/measured_numbers.py docs              all cases; goes on where it was stopped
    python scripts/numbers/measured_numbers.py docs --case flux-512 --count 8

Cases: flux-128 (text to image at the size of training), flux-256 and flux-512 (image to image from that image,
enlarged, positions scaled to those of training), levels-512 and levels-1024 (the call that the demonstration makes),
wan-48 (video at the size of training). Results of one machine are never mixed with another's: a folder of runs belongs
to the machine that began it.
"""

import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from diffusers import FluxImg2ImgPipeline, FluxPipeline, WanPipeline
from PIL import Image

from diffattn import compare, tiny
from diffattn.cli import large
from diffattn.comparison import Comparison, report
from diffattn.files.writing import write_json, write_text, written
from diffattn.measure import hardware, hardware_line
from diffattn.tiny import moving
from diffattn.tiny.shapes import caption, held_out_scenes

STEPS = 10
LEVELS = [f"routing quality={quality}" for quality in ("high", "balanced", "fast")]
FLUX_128 = [
    "clear radius=5",
    "clear radius=2 pool=2",
    "halo tile=4 halo=1",
    "halo tile=2 halo=1 pool=2",
    "neighborhood kernel_size=7",
    "agent num_agents=64",
    "linear",
    "token_merge ratio=0.35 proportional=true use_rand=false",
    "routing share=0.51 tile=2 pool=2",
    "softmax reuse=2",
    "routing share=0.51 tile=2 pool=2 reuse=2",
]
FLUX_256 = [
    "clear radius=7",
    "clear radius=4 pool=4",
    "halo tile=8 halo=1",
    "halo tile=4 halo=1 pool=4",
    "neighborhood kernel_size=13",
    "neighborhood kernel_size=7 pool=4",
    "agent num_agents=64",
    "linear",
    "token_merge ratio=0.5 proportional=true use_rand=false",
    "routing share=0.25 tile=4 pool=4",
    "softmax reuse=3",
    *LEVELS,
]
FLUX_512 = [
    "clear radius=8",
    "clear radius=8 pool=4",
    "halo tile=8 halo=1",
    "halo tile=8 halo=1 pool=4",
    "neighborhood kernel_size=17",
    "agent num_agents=256",
    "linear",
    "token_merge ratio=0.5 proportional=true use_rand=false",
    "softmax reuse=2",
    *LEVELS,
]
WAN = [
    "clear radius=5",
    "clear radius=2 pool=1,3,3",
    "halo tile=1,4,4 halo=1,1,1 pool=1,4,4",
    "agent num_agents=256",
    "dual_scope",
    "linear",
    "routing share=0.25 tile=2 pool=2",
    "routing share=0.25 tile=2 pool=2 order=content",
    "softmax reuse=3",
    *LEVELS,
]
app = typer.Typer(add_completion=False)


class Enlarging:
    """Image to image with the bundled pipeline; positions of larger images are scaled to those of training."""

    def __init__(self, count: int, side: int, large_objects: bool = False) -> None:
        small = FluxPipeline.from_pretrained(tiny.path("flux"))
        small.set_progress_bar_config(disable=True)
        scenes = held_out_scenes(8 * count if large_objects else count, seed=1)
        chosen = [scene for scene in scenes if scene.size == "large" or not large_objects]
        prompts = [caption(scene) for scene in chosen[:count]]
        self.prompts = []
        for number, prompt in enumerate(prompts):
            generator = torch.Generator().manual_seed(number)
            image = small(prompt, generator=generator, **tiny.defaults("flux")).images[0]
            self.prompts.append({"prompt": prompt, "image": image.resize((side, side), Image.Resampling.LANCZOS)})
        self.pipe = FluxImg2ImgPipeline(**small.components)
        zoom = side / tiny.defaults("flux")["height"]
        self.pipe.transformer.pos_embed.register_forward_pre_hook(lambda _, args: (args[0] / zoom,))


def flux_native(count: int, folder: Path) -> Comparison:
    """Text to image at 128 px."""
    pipe = FluxPipeline.from_pretrained(tiny.path("flux"))
    prompts = [caption(scene) for scene in held_out_scenes(count, seed=1)]
    call = {**tiny.defaults("flux"), "num_inference_steps": STEPS}
    return compare(_quiet(pipe), prompts, FLUX_128, folder=folder, **call)


def flux_enlarged(
    count: int,
    folder: Path,
    side: int,
    settings: list[str],
    strength: float = 0.5,
    steps: int = STEPS,
    large_objects: bool = False,
) -> Comparison:
    """Image to image: so many steps are made."""
    case = Enlarging(count, side, large_objects)
    asked = {"strength": strength, "num_inference_steps": round(steps / strength)}
    call = {**tiny.defaults("flux"), "height": side, "width": side, **asked}
    return compare(_quiet(case.pipe), case.prompts, settings, folder=folder, seed=100, **call)


def wan(count: int, folder: Path) -> Comparison:
    """33 frames of 48 px."""
    pipe = WanPipeline.from_pretrained(tiny.path("wan"))
    apart = moving.set_apart_scenes()
    chosen = np.random.default_rng(1).permutation(len(apart))[:count]
    prompts = [moving.caption(apart[index]) for index in chosen]
    call = {**tiny.defaults("wan"), "num_inference_steps": STEPS}
    return compare(_quiet(pipe), prompts, WAN, folder=folder, **call)


def _quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def levels(count: int, folder: Path, side: int) -> Comparison:
    """The call that the demonstration makes, of captions with a large object: small ones get lost at strength 0.2."""
    return flux_enlarged(count, folder, side, LEVELS, large.STRENGTH, large.STEPS, large_objects=True)


CASES: dict[str, tuple[str, Callable[[int, Path], Comparison]]] = {
    "flux-128": ("Bundled Flux, text to image at 128 px, 10 steps", flux_native),
    "flux-256": (
        "Bundled Flux, image to image at 256 px, 10 steps",
        lambda count, folder: flux_enlarged(count, folder, 256, FLUX_256),
    ),
    "flux-512": (
        "Bundled Flux, image to image at 512 px, 10 steps",
        lambda count, folder: flux_enlarged(count, folder, 512, FLUX_512),
    ),
    "levels-512": (
        "Bundled Flux, image to image at 512 px as in the demonstration: strength 0.2, 6 steps",
        lambda count, folder: levels(count, folder, 512),
    ),
    "levels-1024": (
        "Bundled Flux, image to image at 1024 px as in the demonstration: strength 0.2, 6 steps",
        lambda count, folder: levels(count, folder, 1024),
    ),
    "wan-48": ("Bundled Wan, 33 frames of 48 px, 10 steps", wan),
}
PROMPTS = {"levels-512": 8, "levels-1024": 2}
"""Of the other cases 4."""
MARKERS = "<!-- numbers -->", "<!-- /numbers -->"


def levels_table(values: dict[str, Any]) -> str:
    """Markdown of what the levels do in every case that has them, from `numbers.json`."""
    lines = [
        "| | full attention | `high` | `balanced` | `fast` |",
        "|---|---:|---:|---:|---:|",
    ]
    for name, found in values["cases"].items():
        settings = {line["setting"]: line for line in found["settings"]}
        if not settings.keys() >= set(LEVELS):
            continue
        full, count = statistics.median(settings["full"]["seconds"]), len(settings["full"]["seconds"])
        cells = [f"{settings[key]['speedup']:.2f}x, {settings[key]['median_psnr']:.1f} dB" for key in LEVELS]
        prompts = "1 prompt" if count == 1 else f"{count} prompts"
        lines.append(f"| {CASES[name][0]}, {prompts} | {full:.1f} s | {' | '.join(cells)} |")
    return "\n".join(lines)


def into_readme(readme: Path, values: dict[str, Any]) -> None:
    """Put the levels' table between the markers."""
    before, begin, rest = readme.read_text(encoding="utf-8").partition(MARKERS[0])
    _, end, after = rest.partition(MARKERS[1])
    if not end:
        raise typer.BadParameter(f"{readme} must hold {MARKERS[0]} and {MARKERS[1]}, each on its own line")
    write_text(readme, f"{before}{begin}\n{levels_table(values)}\n{end}{after}")


@app.command()
def main(
    output: Annotated[Path, typer.Argument(help="Folder of numbers.md, numbers.json and the plots.")],
    case: Annotated[list[str] | None, typer.Option(help=f"Of {', '.join(CASES)}; repeatable. Default: all.")] = None,
    count: Annotated[
        int | None, typer.Option(min=1, help="Prompts of each case. Default: 4; 8 of levels-512, 2 of levels-1024.")
    ] = None,
    runs: Annotated[Path, typer.Option(help="Folder of the runs, to go on in.")] = Path("outputs/numbers"),
    readme: Annotated[Path | None, typer.Option(help="File whose table of levels is written anew.")] = None,
) -> None:
    """Measure, and write the tables."""
    check_machine(runs)
    names = case or list(CASES)
    unknown = [name for name in names if name not in CASES]
    if unknown:
        raise typer.BadParameter(f"unknown case {unknown[0]}; the cases: {', '.join(CASES)}")
    text = ["# Numbers", "", __doc__.split("\n\n", 2)[2].strip(), ""]
    values: dict[str, Any] = {"machine": hardware(), "cases": {}}
    for name in names:
        title, run = CASES[name]
        prompts = count or PROMPTS.get(name, 4)
        found = run(prompts, runs / name)
        text += [
            f"## {title}",
            "",
            f"{prompts} prompts.",
            "",
            *report.table(found),
            "",
            f"![{title}](numbers-{name}.png)",
            "",
        ]
        values["cases"][name] = found.to_dict()
        with written(output / f"numbers-{name}.png") as path:
            report.plot(found).savefig(path)
        with written(runs / f"{name}-sheet.png") as path:
            report.draw_sheet(found).save(path)
        typer.echo("\n".join(report.table(found)))
    text.insert(2, f"Measured on {hardware_line(hardware())}, by `make numbers`.\n")
    write_text(output / "numbers.md", "\n".join(text))
    write_json(output / "numbers.json", values)
    if readme is not None:
        into_readme(readme, values)


def check_machine(runs: Path) -> None:
    """Raise where the runs that are there are another machine's."""
    own = {key: hardware()[key] for key in ("device", "cores", "threads", "torch")}
    file = runs / "machine.json"
    if file.exists():
        former = json.loads(file.read_text())
        if former != own:
            raise typer.BadParameter(
                f"{runs} has runs of {former['device']}, and this is {own['device']}: give another --runs"
            )
    else:
        runs.mkdir(parents=True, exist_ok=True)
        write_json(file, own)


if __name__ == "__main__":
    app()
