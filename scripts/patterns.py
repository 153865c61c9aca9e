"""The attention patterns of the literature on one model, at one budget: `docs/patterns.md`.

    python scripts/patterns.py solve                      what every budget comes to, and what is missing
    python scripts/patterns.py measure 256                images and errors of a cell; goes on where it was stopped
    python scripts/patterns.py measure 512 --part 1/2     every second setting, beside another process with 2/2
    python scripts/patterns.py by-head 256                per_head by a recipe that is made on other prompts
    python scripts/patterns.py time 256                   one attention call beside full attention; on a quiet machine
    python scripts/patterns.py distill --minutes 10       train every setting that can be, then the same figures
    python scripts/patterns.py page                       docs/patterns.json, the tables of docs/patterns.md, the plots

Cells: 128, 256, 512, video, or all. Figures are kept in --runs, a file for each setting, which belongs to the machine
that began it; `page` puts those of several machines together, and marks times and steps of training. Set
OMP_NUM_THREADS=1 for one process per core.
"""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from patterns_survey import calibrated, collecting, measuring, page, plots, timing, training
from patterns_survey.cells import CELLS, Cell, cell_of
from patterns_survey.settings import SETTINGS, chosen

app = typer.Typer(add_completion=False, help=__doc__, no_args_is_help=True)
Where = Annotated[str, typer.Argument(help=f"{', '.join(CELLS)}, or all.")]
Only = Annotated[list[str] | None, typer.Option(help="Name of a setting; repeatable. Default: all.")]
Part = Annotated[str, typer.Option(help="I/N: every Nth setting from the Ith on.")]
Runs = Annotated[Path, typer.Option(help="Folder of the figures, to go on in.")]
FOLDER = Path("outputs/patterns")


def _cells(where: str, steps: int | None = None) -> list[Cell]:
    return [cell_of(name, steps) for name in (CELLS if where == "all" else [where])]


def _count(cell: Cell, count: int | None) -> int:
    """How many of a cell's prompts are measured."""
    if count is not None and count > cell.prompts:
        raise typer.BadParameter(f"expected at most {cell.prompts} prompts, which {cell.name} has; got {count}")
    return count or cell.prompts


@app.command()
def solve(where: Where = "all", only: Only = None) -> None:
    """Print every setting's options in a cell."""
    for cell in _cells(where):
        typer.echo(f"{cell.name}: {cell.title}, at most {cell.budget:.0%}")
        for setting in chosen(only or []):
            facts = setting.solve(cell).facts
            typer.echo(f"  {facts['share']:6.1%}  {setting.name}: {facts['mechanism']} {facts['note']}")


@app.command()
def measure(
    where: Where,
    only: Only = None,
    part: Part = "1/1",
    count: Annotated[int | None, typer.Option(min=1, help="Of the cell's prompts, the first. Default: all.")] = None,
    steps: Annotated[int | None, typer.Option(min=2, help="Steps that are made. Default: the cell's own.")] = None,
    runs: Runs = FOLDER,
) -> None:
    """PSNR to full attention's images, and errors of the model's output."""
    for cell in _cells(where, steps):
        measuring.measure(cell, chosen(only or [], part), _count(cell, count), runs)


@app.command("by-head")
def by_head(
    where: Where,
    count: Annotated[int | None, typer.Option(min=1, help="Of the cell's prompts, the first. Default: all.")] = None,
    runs: Runs = FOLDER,
) -> None:
    """A recipe that gives each head its radius, made and measured; not of the video."""
    for cell in _cells(where):
        for row in () if cell.is_video else calibrated.ROWS:
            calibrated.measure(row, cell, _count(cell, count), runs)


@app.command("time")
def time_calls(
    where: Where,
    only: Only = None,
    rounds: Annotated[int, typer.Option(min=1)] = timing.ROUNDS,
    steps: Annotated[int | None, typer.Option(min=2, help="As in `measure`.")] = None,
    runs: Runs = FOLDER,
) -> None:
    """Time of one attention call, in rounds with full attention's."""
    for cell in _cells(where, steps):
        timing.time_all(cell, chosen(only or []), runs, rounds)


@app.command()
def distill(
    only: Only = None,
    part: Part = "1/1",
    minutes: Annotated[float, typer.Option(min=0.1, help="Of one core, each.")] = 10.0,
    count: Annotated[int | None, typer.Option(min=1, help="Of the cell's prompts, the first. Default: all.")] = None,
    share: Annotated[float | None, typer.Option(min=0.01, max=1, help="Of all pairs. Default: the cell's.")] = None,
    changes: Annotated[
        list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="A field of the training's config.")
    ] = None,
    runs: Runs = FOLDER,
) -> None:
    """Train every setting of the cell `256` that can be trained, then measure it again.

    With --share or --set they have a table of their own.
    """
    cell = cell_of(training.CELL)
    cell = cell if share is None else replace(cell, budget=share)
    for setting in chosen(only or [], part):
        training.distill(cell, setting, minutes, _count(cell, count), runs, changes or ())


@app.command("page")
def write_page(
    runs: Runs = FOLDER,
    docs: Annotated[Path, typer.Option(help="Folder of patterns.md, patterns.json and the plots.")] = Path("docs"),
) -> None:
    """Collect what was measured, and write tables and plots."""
    values = collecting.collect(
        runs, docs / "patterns.json", [setting.name for setting in (*SETTINGS, *calibrated.ROWS)]
    )
    page.write(docs / "patterns.md", values)
    plots.draw(docs, values)


if __name__ == "__main__":
    logging.getLogger("diffattn").setLevel(logging.ERROR)  # that images are others is what is measured
    app()
