"""Train, export and evaluate the tiny pipelines that ship in `diffattn/tiny`: `flux`, `video` and `wan`.

    python scripts/train_tiny.py vae
    python scripts/train_tiny.py decoder
    python scripts/train_tiny.py flow
    python scripts/train_tiny.py export
    python scripts/train_tiny.py evaluate

    python scripts/train_tiny.py video-vae
    python scripts/train_tiny.py video-flow
    python scripts/train_tiny.py video-export
    python scripts/train_tiny.py video-evaluate

    python scripts/train_tiny.py wan-vae
    python scripts/train_tiny.py wan-decoder
    python scripts/train_tiny.py wan-flow
    python scripts/train_tiny.py wan-export
    python scripts/train_tiny.py wan-evaluate

Every step works on `--work-dir`; with `--resume` `flow`, `video-flow` and `wan-flow` go on from the last checkpoint.
`decoder`, `flow` and `export` may run side by side: a checkpoint is replaced in one rename.
"""

import logging
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from diffusers import AutoencoderKL, AutoencoderKLWan, FluxPipeline, TextToVideoSDPipeline, WanPipeline
from tiny_training.components import build_vae
from tiny_training.export import export_pipeline, export_video_pipeline, export_wan_pipeline, folder_size
from tiny_training.fit_flow import FlowPlan, fit_flow
from tiny_training.fit_vae import fit_vae, refine_decoder
from tiny_training.fit_video import VideoPlan, draw_frames, fit_video
from tiny_training.fit_wan import WanPlan, fit_wan
from tiny_training.fit_wan_vae import fit_wan_vae, refine_wan_decoder
from tiny_training.wan_parts import build_wan_vae

from diffattn import tiny
from diffattn.tiny import moving, shapes
from diffattn.tiny.evaluate import generate, judge, write_sheet
from diffattn.tiny.evaluate_video import generate_videos, judge_videos, write_strips

app = typer.Typer(add_completion=False, help=__doc__, no_args_is_help=True)

WorkDir = Annotated[Path, typer.Option(help="Checkpoints and encoded images.")]
Threads = Annotated[int, typer.Option(help="Compute threads.")]
Nice = Annotated[int, typer.Option(help="How far to step back for other processes.")]
WORK_DIR = Path(tempfile.gettempdir()) / "diffattn-tiny"
VIDEO_WORK_DIR = Path(tempfile.gettempdir()) / "diffattn-video"
WAN_WORK_DIR = Path(tempfile.gettempdir()) / "diffattn-wan"
FOLDER = tiny.path("flux")
VIDEO_FOLDER = tiny.path("video")
WAN_FOLDER = tiny.path("wan")
PLAN = FlowPlan()
VIDEO_PLAN = VideoPlan()
WAN_PLAN = WanPlan()


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
    batch_size: Annotated[int, typer.Option(help="Images a step, per worker.")] = PLAN.batch_size,
    pictures: Annotated[int, typer.Option(help="Encoded images, per worker and size.")] = PLAN.pictures,
    rate: Annotated[float, typer.Option(help="Highest learning rate.")] = PLAN.rate,
    save_every: Annotated[int, typer.Option(help="Steps between checkpoints.")] = PLAN.save_every,
    workers: Annotated[int, typer.Option(help="Processes of one thread each.")] = PLAN.workers,
    compiled: Annotated[bool, typer.Option(help="Compile the blocks: minutes first, then faster.")] = PLAN.compiled,
    seed: int = PLAN.seed,
    start: Annotated[Path | None, typer.Option(help="Pipeline folder whose weights to start from.")] = None,
    resume: Annotated[bool, typer.Option(help="Continue from the last checkpoint.")] = False,
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


@app.command()
def video_vae(
    work_dir: WorkDir = VIDEO_WORK_DIR, steps: int = 500, seed: int = 0, threads: Threads = 1, nice: Nice = 5
) -> None:
    """Train the image pipeline's decoder on frames, and save that VAE in WORK_DIR/vae."""
    settle(threads, nice)
    torch.manual_seed(seed)
    model = AutoencoderKL.from_pretrained(FOLDER / "vae", torch_dtype=torch.float32)
    refine_decoder(model, draw_frames, steps=steps, batch_size=16, rate=1e-3, seed=seed)
    model.save_pretrained(work_dir / "vae")


@app.command()
def video_flow(
    work_dir: WorkDir = VIDEO_WORK_DIR,
    steps: Annotated[int, typer.Option(help="Steps in all.")] = VIDEO_PLAN.steps,
    picture_steps: Annotated[int, typer.Option(help="Steps on single frames.")] = VIDEO_PLAN.picture_steps,
    short_steps: Annotated[int, typer.Option(help="Steps on clips of half the length.")] = VIDEO_PLAN.short_steps,
    batch_size: Annotated[int, typer.Option(help="Clips a step.")] = VIDEO_PLAN.batch_size,
    laps: Annotated[int, typer.Option(help="Encoded videos, of one period each.")] = VIDEO_PLAN.laps,
    rate: Annotated[float, typer.Option(help="Highest learning rate.")] = VIDEO_PLAN.rate,
    decay: Annotated[float, typer.Option(help="Share of the steps over which the rate falls.")] = VIDEO_PLAN.decay,
    save_every: Annotated[int, typer.Option(help="Steps between checkpoints.")] = VIDEO_PLAN.save_every,
    seed: int = VIDEO_PLAN.seed,
    resume: Annotated[bool, typer.Option(help="Continue from the last checkpoint.")] = False,
    threads: Threads = 1,
    nice: Nice = 5,
) -> None:
    """Train the video U-Net and its text encoder, after `video-vae`; checkpoints go to WORK_DIR/video.pt."""
    settle(threads, nice)
    plan = VideoPlan(
        steps=steps,
        picture_steps=picture_steps,
        short_steps=short_steps,
        batch_size=batch_size,
        laps=laps,
        rate=rate,
        decay=decay,
        save_every=save_every,
        seed=seed,
    )
    fit_video(plan, work_dir, resume)


@app.command()
def video_export(
    work_dir: WorkDir = VIDEO_WORK_DIR,
    folder: Annotated[Path, typer.Option(help="Where the pipeline goes.")] = VIDEO_FOLDER,
) -> None:
    """Write the averaged weights of the last checkpoint as a TextToVideoSDPipeline folder."""
    export_video_pipeline(work_dir, folder)
    typer.echo(f"{folder}: {folder_size(folder) / 1e6:.2f} MB")


@app.command()
def video_evaluate(
    folder: Annotated[Path, typer.Option(help="A TextToVideoSDPipeline folder.")] = VIDEO_FOLDER,
    strips: Annotated[Path, typer.Option(help="Where the PNGs go.")] = VIDEO_WORK_DIR,
    count: Annotated[int, typer.Option(help="Held-out prompts.")] = 16,
    steps: Annotated[int, typer.Option(help="Denoising steps.")] = 20,
    guidance: Annotated[float, typer.Option(help="Guidance scale.")] = tiny.NATIVE["video"]["guidance_scale"],
    seed: int = 0,
    threads: Threads = 1,
    nice: Nice = 5,
) -> None:
    """Draw held-out prompts twice, in full and without colour, shape and motion; print what was kept."""
    settle(threads, nice)
    pipeline = TextToVideoSDPipeline.from_pretrained(folder)
    chosen = moving.held_out_scenes(count, seed)
    strips.mkdir(parents=True, exist_ok=True)
    options = {"seed": seed, "num_inference_steps": steps, "guidance_scale": guidance}
    for name, said in (("named", True), ("unnamed", False)):
        texts = [moving.caption(scene, colour=said, shape=said, motion=said) for scene in chosen]
        videos = generate_videos(pipeline, texts, **options)
        write_strips(videos, strips / f"{name}.png")
        findings, measured = judge_videos(videos, chosen)
        for part in ("colour_kept", "shape_kept", "background_kept", "motion_kept", "kept") if said else ():
            typer.echo(f"{name} {part}: {sum(getattr(finding, part) for finding in findings)} of {count}")
        for figure in ("identity", "colour_identity", "shape_identity", "background_identity", "clean", "acceleration"):
            values = [getattr(figures, figure) for figures in measured]
            typer.echo(f"{name} {figure}: mean {np.nanmean(values):.3f}, worst {worst(figure)(values):.3f}")


@app.command()
def wan_vae(
    work_dir: WorkDir = WAN_WORK_DIR, steps: int = 1500, seed: int = 0, threads: Threads = 1, nice: Nice = 5
) -> None:
    """Train the VAE of Wan's class on clips, and save it in WORK_DIR/vae."""
    settle(threads, nice)
    torch.manual_seed(seed)
    model = build_wan_vae()
    fit_wan_vae(model, steps=steps, batch_size=4, rate=2e-3, seed=seed)
    model.save_pretrained(work_dir / "vae")


@app.command()
def wan_decoder(
    work_dir: WorkDir = WAN_WORK_DIR, steps: int = 600, seed: int = 0, threads: Threads = 1, nice: Nice = 5
) -> None:
    """Train the decoder of WORK_DIR/vae on, on whole clips; `wan-flow` may run beside it, for latents stay valid."""
    settle(threads, nice)
    torch.manual_seed(seed)
    model = AutoencoderKLWan.from_pretrained(work_dir / "vae")
    refine_wan_decoder(model, steps=steps, batch_size=2, rate=1e-3, seed=seed)
    model.save_pretrained(work_dir / "vae")


@app.command()
def wan_flow(
    work_dir: WorkDir = WAN_WORK_DIR,
    steps: Annotated[int, typer.Option(help="Steps in all.")] = WAN_PLAN.steps,
    picture_steps: Annotated[int, typer.Option(help="Steps on single frames.")] = WAN_PLAN.picture_steps,
    short_steps: Annotated[int, typer.Option(help="Steps on the first latent frames.")] = WAN_PLAN.short_steps,
    spread_steps: Annotated[int, typer.Option(help="Steps on frames from all over clips.")] = WAN_PLAN.spread_steps,
    batch_size: Annotated[int, typer.Option(help="Clips a step.")] = WAN_PLAN.batch_size,
    clips: Annotated[int, typer.Option(help="Encoded clips.")] = WAN_PLAN.clips,
    rate: Annotated[float, typer.Option(help="Highest learning rate.")] = WAN_PLAN.rate,
    save_every: Annotated[int, typer.Option(help="Steps between checkpoints.")] = WAN_PLAN.save_every,
    seed: int = WAN_PLAN.seed,
    start: Annotated[
        Path | None, typer.Option(help="Pipeline folder whose weights to train on, on whole clips.")
    ] = None,
    resume: Annotated[bool, typer.Option(help="Continue from the last checkpoint.")] = False,
    threads: Threads = 1,
    nice: Nice = 5,
) -> None:
    """Train the video transformer and its text encoder, after `wan-vae`; checkpoints go to WORK_DIR/wan.pt."""
    settle(threads, nice)
    plan = WanPlan(
        steps=steps,
        picture_steps=picture_steps,
        short_steps=short_steps,
        spread_steps=spread_steps,
        batch_size=batch_size,
        clips=clips,
        rate=rate,
        save_every=save_every,
        seed=seed,
    )
    if start is not None:
        AutoencoderKLWan.from_pretrained(start / "vae", torch_dtype=torch.float32).save_pretrained(work_dir / "vae")
    fit_wan(plan, work_dir, resume=resume, start=start)


@app.command()
def wan_export(
    work_dir: WorkDir = WAN_WORK_DIR,
    folder: Annotated[Path, typer.Option(help="Where the pipeline goes.")] = WAN_FOLDER,
) -> None:
    """Write the averaged weights of the last checkpoint as a WanPipeline folder."""
    export_wan_pipeline(work_dir, folder)
    typer.echo(f"{folder}: {folder_size(folder) / 1e6:.2f} MB")


@app.command()
def wan_evaluate(
    folder: Annotated[Path, typer.Option(help="A WanPipeline folder.")] = WAN_FOLDER,
    strips: Annotated[Path, typer.Option(help="PNG to write.")] = WAN_WORK_DIR / "strips.png",
    count: Annotated[int, typer.Option(help="Captions set apart, in random order; 64 are all.")] = 64,
    steps: Annotated[int, typer.Option(help="Denoising steps.")] = tiny.NATIVE["wan"]["num_inference_steps"],
    guidance: Annotated[float, typer.Option(help="Guidance scale.")] = tiny.NATIVE["wan"]["guidance_scale"],
    seed: int = 0,
    threads: Threads = 1,
    nice: Nice = 5,
) -> None:
    """Draw captions that training never saw, and print what the judge finds kept."""
    settle(threads, nice)
    pipeline = WanPipeline.from_pretrained(folder)
    apart = moving.set_apart_scenes()
    chosen = [apart[index] for index in np.random.default_rng(seed).permutation(len(apart))[:count]]
    options = {"name": "wan", "seed": seed, "num_inference_steps": steps, "guidance_scale": guidance}
    videos = generate_videos(pipeline, [moving.caption(scene) for scene in chosen], **options)
    strips.parent.mkdir(parents=True, exist_ok=True)
    write_strips([video[::4] for video in videos], strips)
    findings, measured = judge_videos(videos, chosen)
    for part in ("colour_kept", "shape_kept", "background_kept", "motion_kept", "kept"):
        typer.echo(f"{part}: {sum(getattr(finding, part) for finding in findings)} of {count}")
    for figure in ("identity", "clean", "acceleration"):
        values = [getattr(figures, figure) for figures in measured]
        typer.echo(f"{figure}: mean {np.nanmean(values):.3f}, worst {worst(figure)(values):.3f}")


def worst(figure: str) -> Callable[[Sequence[float]], float]:
    """The function that picks the worst of the values of a figure."""
    return max if figure == "acceleration" else min


if __name__ == "__main__":
    app()
