"""Train, export and evaluate the tiny text-to-image pipeline that ships in `diffattn/tiny/flux`.

    python scripts/train_tiny.py vae
    python scripts/train_tiny.py decoder
    python scripts/train_tiny.py flow
    python scripts/train_tiny.py export
    python scripts/train_tiny.py evaluate

Every step works on `--work-dir`; `flow --resume` goes on from the last checkpoint there. `decoder`, `flow`
and `export` may run side by side: a checkpoint is replaced in one rename.
"""

import logging
import os
import tempfile
from pathlib import Path
from typing import Annotated

import torch
import typer
from diffusers import AutoencoderKL, FluxPipeline

from diffattn import tiny
from diffattn.tiny import shapes
from diffattn.tiny.components import build_vae
from diffattn.tiny.evaluate import generate, judge, write_sheet
from diffattn.tiny.export import export_pipeline, folder_size
from diffattn.tiny.fit_flow import FlowPlan, fit_flow
from diffattn.tiny.fit_vae import fit_vae, refine_decoder

app = typer.Typer(add_completion=False, help=__doc__, no_args_is_help=True)

WorkDir = Annotated[Path, typer.Option(help="Checkpoints and encoded pictures.")]
Threads = Annotated[int, typer.Option(help="Compute threads.")]
Nice = Annotated[int, typer.Option(help="How far to step back for other processes.")]
WORK_DIR = Path(tempfile.gettempdir()) / "diffattn-tiny"
FOLDER = tiny.path("flux")
PLAN = FlowPlan()


def settle(threads: int, nice: int) -> None:
    """Apply the process-wide options."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(threads)
    os.nice(nice)


@app.command()
def vae(work_dir: WorkDir = WORK_DIR, steps: int = 1800, seed: int = 0, threads: Threads = 2, nice: Nice = 5) -> None:
    """Train the VAE and save it in WORK_DIR/vae."""
    settle(threads, nice)
    torch.manual_seed(seed)
    model = build_vae()
    fit_vae(model, steps=steps, batch_size=16, rate=2e-3, seed=seed)
    model.save_pretrained(work_dir / "vae")


@app.command()
def decoder(
    work_dir: WorkDir = WORK_DIR, steps: int = 600, seed: int = 0, threads: Threads = 2, nice: Nice = 5
) -> None:
    """Train the decoder of WORK_DIR/vae on; this may run beside `flow`, whose latents it leaves valid."""
    settle(threads, nice)
    torch.manual_seed(seed)
    model = AutoencoderKL.from_pretrained(work_dir / "vae")
    refine_decoder(model, steps=steps, batch_size=8, rate=1e-3, seed=seed)
    model.save_pretrained(work_dir / "vae")


@app.command()
def flow(
    work_dir: WorkDir = WORK_DIR,
    steps: Annotated[int, typer.Option(help="Steps in all.")] = PLAN.steps,
    small_steps: Annotated[int, typer.Option(help="Steps at half size, before the rest.")] = PLAN.small_steps,
    batch_size: Annotated[int, typer.Option(help="Pictures a step, per worker.")] = PLAN.batch_size,
    pictures: Annotated[int, typer.Option(help="Encoded pictures, per worker and size.")] = PLAN.pictures,
    rate: Annotated[float, typer.Option(help="Highest learning rate.")] = PLAN.rate,
    save_every: Annotated[int, typer.Option(help="Steps between checkpoints.")] = PLAN.save_every,
    workers: Annotated[int, typer.Option(help="Processes of one thread each.")] = PLAN.workers,
    compiled: Annotated[bool, typer.Option(help="Compile the blocks: minutes first, then faster.")] = PLAN.compiled,
    seed: int = PLAN.seed,
    start: Annotated[Path | None, typer.Option(help="Pipeline folder whose weights to start from.")] = None,
    resume: Annotated[bool, typer.Option(help="Go on from the last checkpoint.")] = False,
    nice: Nice = 5,
) -> None:
    """Train the transformer and the text encoders, after `vae`; checkpoints go to WORK_DIR/flow.pt."""
    plan = FlowPlan(
        steps=steps,
        small_steps=small_steps,
        batch_size=batch_size,
        pictures=pictures,
        rate=rate,
        save_every=save_every,
        workers=workers,
        compiled=compiled,
        seed=seed,
        start=start,
    )
    (work_dir / "workers").unlink(missing_ok=True)
    if workers == 1:
        fit_flow(0, plan, work_dir, resume, nice)
        return
    torch.multiprocessing.spawn(fit_flow, (plan, work_dir, resume, nice), nprocs=workers)


@app.command()
def export(
    work_dir: WorkDir = WORK_DIR,
    folder: Annotated[Path, typer.Option(help="Where the pipeline goes.")] = FOLDER,
) -> None:
    """Write the averaged weights of the last checkpoint as a FluxPipeline folder."""
    export_pipeline(work_dir, folder)
    typer.echo(f"{folder}: {folder_size(folder) / 1e6:.2f} MB")


@app.command()
def evaluate(
    folder: Annotated[Path, typer.Option(help="A FluxPipeline folder.")] = FOLDER,
    sheet: Annotated[Path, typer.Option(help="PNG to write.")] = WORK_DIR / "sheet.png",
    count: Annotated[int, typer.Option(help="Held-out prompts.")] = 64,
    steps: Annotated[int, typer.Option(help="Denoising steps.")] = 20,
    seed: int = 0,
    threads: Threads = 2,
    nice: Nice = 5,
) -> None:
    """Draw held-out prompts, print the share whose colour, place and background are as promised, write a sheet."""
    settle(threads, nice)
    chosen = shapes.held_out_scenes(count, seed)
    pictures = generate(FluxPipeline.from_pretrained(folder), chosen, seed=seed, num_inference_steps=steps)
    findings, share = judge(pictures, chosen)
    sheet.parent.mkdir(parents=True, exist_ok=True)
    write_sheet(pictures, chosen, findings, sheet)
    for part in ("background_kept", "object_kept", "place_kept", "kept"):
        typer.echo(f"{part}: {sum(getattr(finding, part) for finding in findings)} of {count}")
    typer.echo(f"share found: {share:.3f}; sheet: {sheet}")


if __name__ == "__main__":
    app()
