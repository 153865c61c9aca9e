"""What a calibration gains over one setting for all layers and steps, on prompts that it did not see.

    python scripts/numbers/calibration_gain.py    8 prompts calibrate, 16 others judge; goes on where it stopped

The bundled Flux pipeline, image to image at 256 px from its own image of 128 px, 10 steps. Calibrated once for a share
of full attention's operations and once for a fidelity; beside both, `routing` at several shares with and without reuse.
"""

import statistics
from pathlib import Path
from typing import Annotated

import typer
from measured_numbers import STEPS, Enlarging

from diffattn import calibrate, compare, tiny
from diffattn.comparison import report
from diffattn.files.writing import write_json, write_text
from diffattn.measure import hardware, hardware_line

SIDE, CALIBRATING, JUDGING = 256, 8, 16
UNIFORM = [
    *(f"routing share={share} tile=4 pool=4" for share in (0.14, 0.18, 0.25, 0.35, 0.5)),
    *(f"routing share={share} tile=4 pool=4 reuse=2" for share in (0.14, 0.18, 0.25, 0.41, 0.5)),
    *(f"routing share={share} tile=4 pool=4 reuse=3" for share in (0.14, 0.18, 0.25, 0.35, 0.62)),
    *(f"softmax reuse={reuse}" for reuse in (2, 3)),
]
"""At 0.25, 0.41 with reuse=2 and 0.62 with reuse=3 they compute a quarter of all pairs."""


def main(
    share: Annotated[float, typer.Option(help="Of full attention's operations.")] = 0.25,
    target: Annotated[float, typer.Option(help="PSNR in dB.")] = 38.0,
    output: Annotated[Path, typer.Option(help="Folder.")] = Path("outputs/calibration"),
) -> None:
    """Calibrate, judge, and write the table."""
    case = Enlarging(CALIBRATING + JUDGING, SIDE)
    case.pipe.set_progress_bar_config(disable=True)
    seen, others = case.prompts[:CALIBRATING], case.prompts[CALIBRATING:]
    call = {**tiny.defaults("flux"), "height": SIDE, "width": SIDE, "strength": 0.5, "num_inference_steps": 2 * STEPS}
    settings = list(UNIFORM)
    for name, asked in {"share": {"share": share}, "target": {"target": target}}.items():
        recipe = calibrate(case.pipe, seen, folder=output / "work", seed=1000, **asked, **call)
        file = output / f"recipe-{name}.json"
        recipe.save(file)
        settings.append(f"recipe={file}")
        reached, cost = statistics.median(recipe.made["psnr"]), recipe.made["share"]
        typer.echo(f"{name}: {cost:.1%} of the operations, {reached:.1f} dB on its own prompts")
    found = compare(case.pipe, others, settings, folder=output / "judged", seed=2000, **call)
    means = [
        f"| `{line.setting}` | {line.computed:.3f} | {statistics.mean(line.psnr):.1f} |" for line in found.lines[1:]
    ]
    text = [
        f"{JUDGING} prompts that the calibration did not see; {hardware_line(hardware())}",
        "",
        *report.table(found),
        "",
        "| | share | mean PSNR |",
        "|---|---:|---:|",
        *means,
    ]
    write_text(output / "calibration.md", "\n".join(text) + "\n")
    write_json(output / "calibration.json", found.to_dict())
    typer.echo("\n".join(text))


if __name__ == "__main__":
    typer.run(main)
