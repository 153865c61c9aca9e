"""Trials of `diffattn distill` on the bundled pipeline: what was tried, what it took, how near it came.

    python scripts/numbers/distillation_trials.py list
    python scripts/numbers/distillation_trials.py run                            all; goes on where it was stopped
    python scripts/numbers/distillation_trials.py run --group radii --part 1/2   every second, beside another process
    python scripts/numbers/distillation_trials.py page                           docs/distillation.json, and its tables

Every trial is the preset `tiny` with some fields changed: one run in a folder of its own, its figures in `trial.json`
there. `page` collects them in docs/distillation.json, which keeps those that the folder does not have, and writes the
tables of docs/distillation.md between their markers. Times are of CPU, of all of a run's threads. Set OMP_NUM_THREADS=1
for one process per core.
"""

import itertools
import json
import logging
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from diffattn.distill.config import DistillConfig, override, preset
from diffattn.distill.data.shapes import held_out
from diffattn.distill.evaluation.evaluate import compare, draw_all, velocities
from diffattn.distill.run import open_run, train
from diffattn.distill.setting import open_setting
from diffattn.distill.training.log import LOG, read_log

from diffattn.files.writing import write_json, write_text, written
from diffattn.measure import hardware
from diffattn.media.drawing import figure_class

app = typer.Typer(add_completion=False, help=__doc__, no_args_is_help=True)
FOLDER = Path("outputs/trials")
SAMPLES, PROMPTS, SEED = 32, 24, 1
HOUR = 2000
"""Steps of 16 images that fit into an hour of one core of the machine of the documents."""


@dataclass(frozen=True)
class Trial:
    """One run."""

    name: str
    group: str
    options: tuple[str, ...]
    """Fields over the preset's."""
    others: tuple[str, ...] = ()
    """Settings that its weights are judged in besides its own."""

    @property
    def config(self) -> DistillConfig:
        return override(preset("tiny"), self.options)

    @property
    def folder(self) -> str:
        return f"{self.group}/{self.name.replace(' ', '-')}"


RADII = ("3", "4", "6", "8")
SLOPES = ("drawn.radius=3,4,5,6,7,8", "slopes=true")
ONE_SIZE = ("loss.target=0", "clip=1e-3")
"""By the teacher alone; and every gradient is scaled to one length, so that an easy setting counts as a hard one."""
AGENT = ("mechanism=agent", "mechanism.agent_size=8,8")
TRAINED_AGENT = (*AGENT, "mechanism.bias=true", "mechanism.depthwise_conv=true", "mechanism.window=16", *ONE_SIZE)
LINEAR = ("mechanism=linear",)
LEARNED = (*LINEAR, "mechanism.feature_map=learned", "mechanism.local_residual=5,5", *ONE_SIZE)
LONG = (f"steps={HOUR}", "warmup=50")
TRIALS = (
    *(Trial(f"radius {own}", "radii", (f"mechanism.radius={own}",)) for own in RADII),
    Trial(
        "radii 3 to 8 drawn", "radii", ("drawn.radius=3,4,5,6,7,8",), tuple(f"mechanism.radius={own}" for own in RADII)
    ),
    Trial(
        "the same, with slopes",
        "radii",
        SLOPES,
        tuple(f"mechanism.radius={own}" for own in RADII),
    ),
    *(Trial(f"radius {own}, steps of one size", "radii", (f"mechanism.radius={own}", *ONE_SIZE)) for own in RADII),
    Trial(
        "by the teacher alone",
        "radii",
        (*SLOPES, "loss.target=0"),
        tuple(f"mechanism.radius={own}" for own in RADII),
    ),
    Trial(
        "steps of one size",
        "radii",
        (*SLOPES, *ONE_SIZE),
        tuple(f"mechanism.radius={own}" for own in RADII),
    ),
    Trial(
        "and four times the rate",
        "radii",
        (*SLOPES, *ONE_SIZE, "rate=2e-3"),
        tuple(f"mechanism.radius={own}" for own in RADII),
    ),
    Trial("blocks of 2", "means", ("mechanism.pool=2", "backend=dense")),
    Trial("blocks of 4", "means", ("mechanism.pool=4", "backend=dense")),
    Trial("all but features", "losses", ()),
    Trial("by the teacher alone", "losses", ("loss.target=0",)),
    Trial("steps of one size", "losses", ONE_SIZE),
    Trial("and four times the rate", "losses", (*ONE_SIZE, "rate=2e-3")),
    Trial("with features", "losses", ("loss.features=0.02",)),
    Trial("features for attention", "losses", ("loss.features=0.02", "loss.attention=0")),
    Trial("layers first", "losses", ("layerwise=100",)),
    Trial("noises recur", "losses", ("noises=1", "teacher_cache=2")),
    Trial("as it is", "agent", AGENT),
    Trial("steps of one size", "agent", (*AGENT, *ONE_SIZE)),
    Trial("biases and convolution", "agent", TRAINED_AGENT),
    Trial("and layers first", "agent", (*TRAINED_AGENT, "layerwise=100")),
    Trial("and four times the rate", "agent", (*TRAINED_AGENT, "rate=2e-3")),
    Trial("and features", "agent", (*TRAINED_AGENT, "rate=2e-3", "loss.features=0.05")),
    Trial("an hour", "agent", (*TRAINED_AGENT, "rate=2e-3", *LONG)),
    Trial("elu", "linear", LINEAR),
    Trial("steps of one size", "linear", (*LINEAR, *ONE_SIZE)),
    Trial("InLine, 3 x 3", "linear", (
        *LINEAR, "mechanism.feature_map=identity", "mechanism.normalization=subtraction",
        "mechanism.local_residual=3,3", *ONE_SIZE)),
    Trial("learned maps", "linear", (*LINEAR, "mechanism.feature_map=learned", *ONE_SIZE)),
    Trial("and 5 x 5", "linear", LEARNED),
    Trial("and layers first", "linear", (*LEARNED, "layerwise=100")),
    Trial("and four times the rate", "linear", (*LEARNED, "rate=2e-3")),
    Trial("an hour", "linear", (*LEARNED, "rate=2e-3", *LONG)),
)  # fmt: skip
GROUPS = tuple(dict.fromkeys(trial.group for trial in TRIALS))


def chosen(group: str | None, only: list[str] | None, part: str) -> Iterator[Trial]:
    """The trials of a group, or those named, every Nth from the Ith on."""
    index, _, count = part.partition("/")
    found = [one for one in TRIALS if group in (None, one.group) and (not only or one.name in only)]
    if not found:
        raise typer.BadParameter(f"expected a group of {', '.join(GROUPS)} and names of its trials; see `list`")
    yield from itertools.islice(found, int(index) - 1, None, int(count))


@app.command("list")
def show(group: Annotated[str | None, typer.Option(help=", ".join(GROUPS))] = None) -> None:
    """Print the trials."""
    for trial in chosen(group, None, "1/1"):
        typer.echo(f"{trial.group}: {trial.name}: {' '.join(trial.options)}")


@app.command()
def run(
    group: Annotated[str | None, typer.Option(help=", ".join(GROUPS))] = None,
    only: Annotated[list[str] | None, typer.Option(help="Name of a trial; repeatable.")] = None,
    part: Annotated[str, typer.Option(help="I/N: every Nth trial from the Ith on.")] = "1/1",
    steps: Annotated[int | None, typer.Option(min=1, help="Of every trial, for a look. Default: its own.")] = None,
    output: Annotated[Path, typer.Option(help="Folder of the runs.")] = FOLDER,
) -> None:
    """Train and judge; what is done is not done again."""
    for trial in chosen(group, only, part):
        folder = output / trial.folder
        record = read(folder)
        config = trial.config if steps is None else override(trial.config, [f"steps={steps}"])
        if record.get("config") != json.loads(json.dumps(config.to_dict())):
            record = {"config": config.to_dict(), "cpu_seconds": 0.0, "machine": hardware()}
            record["vectors"] = torch.backends.cpu.get_cpu_capability()
        if "judged" not in record:
            learn(config, folder, record)
            judge(trial, folder, record)
        typer.echo(f"{trial.group}: {trial.name}: {line(record)}")


def learn(config: DistillConfig, folder: Path, record: dict[str, Any]) -> None:
    """Train on from the last checkpoint; the time of steps that are lost by a kill is not counted."""
    start = time.process_time()
    _, outcome = train(config, folder, resume=True, progress=True)
    record["cpu_seconds"] += time.process_time() - start
    write_json(folder / "trial.json", record)
    if not outcome.finished:
        raise SystemExit(f"stopped at step {outcome.step} of {config.steps}: the same command goes on")


@torch.no_grad()
def judge(trial: Trial, folder: Path, record: dict[str, Any]) -> None:
    """Errors in every setting, and images in its own."""
    prompts, judged = held_out(PROMPTS), {}
    for number, options in enumerate(((), *((own,) for own in trial.others))):
        setting = open_run(folder, options=options)
        setting.student.model.eval()
        _, totals = velocities(
            setting.student, setting.scheduler, setting.held_out(), SAMPLES, setting.config.guidance, SEED
        )
        mechanism = str(setting.student.handle.layers[0].mechanism)
        alone = totals["swap alone"]
        if setting.config.mechanism.weights(4, 40) is not None:  # which the swap alone has as they were trained
            fresh = open_setting(setting.config)
            fresh.student.model.eval()
            _, before = velocities(
                fresh.student, fresh.scheduler, fresh.held_out(), SAMPLES, setting.config.guidance, SEED
            )
            alone = before["student"]
        judged[mechanism] = {"student": totals["student"], "swap_alone": alone}
        if number == 0:
            pictures = compare(draw_all(setting.student, setting.draw, prompts, SEED), prompts)
            record["psnr"] = pictures.psnr
    record["judged"] = judged
    write_json(folder / "trial.json", record)


def read(folder: Path) -> dict[str, Any]:
    file = folder / "trial.json"
    return dict(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else {}


def line(record: dict[str, Any]) -> str:
    """A trial in words."""
    said = [
        f"{mechanism} {own['student']:.4f}, alone {own['swap_alone']:.3f}, {own['swap_alone'] / own['student']:.1f}x"
        for mechanism, own in record["judged"].items()
    ]
    return f"{'; '.join(said)}; {record['psnr']['student']:.1f} dB; {record['cpu_seconds'] / 60:.1f} min"


HEAD = (
    "| trial | options | CPU min | judged as | velocity error | of the swap alone | ratio | PSNR |",
    "|---|---|---:|---|---:|---:|---:|---:|",
)


KEPT = ("judged", "psnr", "cpu_seconds", "vectors")
BINS = 30
PANELS = {
    "clear, radius 6": {"radii/radius-6": "the preset", "radii/radius-6,-steps-of-one-size": "steps of one size"},
    "agent, 64 agents": {
        "agent/as-it-is": "the preset",
        "agent/steps-of-one-size": "steps of one size",
        "agent/biases-and-convolution": "and biases and convolution",
        "agent/and-four-times-the-rate": "and four times the rate",
    },
    "linear": {
        "linear/elu": "the preset",
        "linear/steps-of-one-size": "steps of one size",
        "linear/and-5-x-5": "and learned maps, 5 x 5",
        "linear/and-four-times-the-rate": "and four times the rate",
    },
}
"""Title -> folder of a trial -> what is written beside its curve."""


def collect(output: Path, file: Path) -> dict[str, Any]:
    """What is known of every trial, by its folder: of the runs in `output`, else of `file`, which is written anew."""
    known = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    found = {}
    for trial in TRIALS:
        own = read(output / trial.folder)
        if "judged" in own:
            kept = {key: own[key] for key in KEPT} | {"curve": curve(output / trial.folder)}
            known[trial.folder] = {"options": list(trial.options)} | kept
        if known.get(trial.folder, {}).get("options") == list(trial.options):
            found[trial.folder] = known[trial.folder]
    lines = [f" {json.dumps(name)}: {json.dumps(record)}" for name, record in found.items()]
    write_text(file, "{\n" + ",\n".join(lines) + "\n}\n")
    return found


def curve(folder: Path) -> list[list[float]]:
    """The loss to the teacher's prediction over the steps: (step, mean) of `BINS` parts of a run."""
    rows = [(row["step"], row["prediction"]) for row in read_log(folder / LOG) if "prediction" in row]
    size = max(1, len(rows) // BINS)
    parts = [rows[first : first + size] for first in range(0, len(rows), size)]
    return [[part[-1][0], float(f"{statistics.fmean(loss for _, loss in part):.4g}")] for part in parts]


def draw(file: Path, known: dict[str, Any]) -> None:
    """The curves of `PANELS`, side by side."""
    figure = figure_class()(figsize=(5 * len(PANELS), 3.6), layout="constrained", dpi=110)
    for axes, (title, names) in zip(figure.subplots(1, len(PANELS), sharey=True), PANELS.items(), strict=True):
        for name, label in names.items():
            if points := known.get(name, {}).get("curve"):
                axes.plot([step for step, _ in points], [loss for _, loss in points], label=label)
        axes.set_yscale("log")
        axes.set_title(title, loc="left")
        axes.set_xlabel("step")
        axes.grid(which="both", color="#dadce0", linewidth=0.4)
        axes.legend(frameon=False, fontsize=8)
    figure.axes[0].set_ylabel("loss to the teacher's prediction")
    with written(file) as path:
        figure.savefig(path)


def table(group: str, known: dict[str, Any]) -> str:
    """The trials of a group that are done, in Markdown."""
    rows = []
    for trial in chosen(group, None, "1/1"):
        record = known.get(trial.folder, {})
        for number, (mechanism, own) in enumerate(record.get("judged", {}).items()):
            better = own["swap_alone"] / own["student"]
            ratio = f"`{mechanism}` | {own['student']:.4f} | {own['swap_alone']:.4f} | {better:.1f}"
            if number:
                rows.append(f"| | | | {ratio} | |")
                continue
            said = " ".join(own for own in trial.options if not own.startswith("mechanism")) or "the preset"
            minutes = f"{record['cpu_seconds'] / 60:.1f} ({record['vectors']})"
            rows.append(f"| {trial.name} | `{said}` | {minutes} | {ratio} | {record['psnr']['student']:.1f} dB |")
    return "\n".join([*HEAD, *rows]) if rows else "*Not measured yet.*"


@app.command()
def page(
    output: Annotated[Path, typer.Option(help="Folder of the runs.")] = FOLDER,
    docs: Annotated[Path, typer.Option(help="Folder of distillation.md and distillation.json.")] = Path("docs"),
) -> None:
    """Write the tables between `<!-- trials GROUP -->` and `<!-- /trials GROUP -->`."""
    file, known = docs / "distillation.md", collect(output, docs / "distillation.json")
    draw(docs / "distill-trials.png", known)
    text = file.read_text(encoding="utf-8")
    for group in GROUPS:
        begin, end = f"<!-- trials {group} -->", f"<!-- /trials {group} -->"
        before, found, rest = text.partition(begin)
        _, closed, after = rest.partition(end)
        if found and closed:
            text = f"{before}{begin}\n{table(group, known)}\n{end}{after}"
    write_text(file, text)


if __name__ == "__main__":
    logging.getLogger("diffattn").setLevel(logging.ERROR)
    app()
