"""Training of the tiny video U-Net and its text encoder on latents, by v-prediction.

    x_t = a_t x + s_t noise        target v = a_t noise - s_t x        (Salimans & Ho 2022, https://arxiv.org/abs/2202.00512)

The spatial layers learn first, on single frames, while the temporal ones are left out; these start as the identity and
join when training goes on to clips. Clips are windows of laps, which return to their first frame: a window may start
anywhere in its lap and run forwards or backwards.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn
from tqdm import tqdm

from diffattn.tiny import moving
from diffattn.tiny.moving import FRAMES, Course, MovingScene
from diffattn.tiny.shapes import to_tensor
from tiny_training.components import build_clip, build_unet, build_video_scheduler
from tiny_training.fast_unet import identity_temporal, quicken, without_temporal
from tiny_training.fit import Plan, Trainer
from tiny_training.fit_vae import encode
from tiny_training.text import MAX_VIDEO_TOKENS, clip_tokenizer, video_caption_words

WORLD = tuple(moving.scenes())


@dataclass(frozen=True, kw_only=True)
class VideoPlan(Plan):
    """How long and how fast to train; `batch_size` counts clips."""

    steps: int = 10400
    picture_steps: int = 1100
    """Steps on single frames, the first of all."""
    short_steps: int = 6200
    """Steps on clips of half the native length, after those on single frames."""
    batch_size: int = 4
    laps: int = 576
    """Encoded laps, of one period each."""
    rate: float = 1.5e-3
    decay: float = 0.2
    ema: float = 0.995
    caption_dropout: float = 0.1
    object_weight: float = 4.0
    """Weight of the object's cells in the loss, where there is no noise."""

    def shape_at(self, step: int) -> tuple[int, int]:
        """Clips and frames of each in a step's batch; fewer frames leave room for more clips."""
        if step < self.picture_steps:
            return FRAMES * self.batch_size, 1
        if step < self.picture_steps + self.short_steps:
            return 2 * self.batch_size, FRAMES // 2
        return self.batch_size, FRAMES


def draw_frames(count: int, rng: np.random.Generator) -> Tensor:
    """Single frames of `count` random scenes, float32 (batch, 3, side, side) in -1..1."""
    chosen = [WORLD[index] for index in rng.integers(len(WORLD), size=count)]
    return to_tensor(np.concatenate([moving.render(scene, moving.draw_course(scene, rng), 1) for scene in chosen]))


class TinyVideo(nn.Module):
    """Everything that is trained on latents."""

    def __init__(self) -> None:
        """Build untrained parts."""
        super().__init__()
        self.tokenizer = clip_tokenizer(video_caption_words(), MAX_VIDEO_TOKENS)
        self.clip = build_clip(self.tokenizer, num_layers=2)
        self.unet = build_unet()
        identity_temporal(self.unet)
        self.alphas_cumprod = build_video_scheduler().alphas_cumprod

    def encode(self, texts: Sequence[str]) -> Tensor:
        """Text states (batch, MAX_VIDEO_TOKENS, CLIP_DIM)."""
        options = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
        return self.clip(self.tokenizer(list(texts), **options).input_ids)[0]

    def loss(self, latents: Tensor, texts: Sequence[str], generator: torch.Generator, object_weight: float) -> Tensor:
        """Mean squared error of v at random timesteps for latents (batch, channels, frames, rows, columns).

        The object's cells weigh 1 + (object_weight - 1) a_t^2: more, but not while noise still hides where it is.
        """
        noise = torch.randn(latents.shape, generator=generator)
        timestep = torch.randint(len(self.alphas_cumprod), (len(latents),), generator=generator)
        kept = self.alphas_cumprod[timestep].view(-1, 1, 1, 1, 1)
        signal, spread = kept.sqrt(), (1.0 - kept).sqrt()
        predicted = self.unet(signal * latents + spread * noise, timestep, self.encode(texts)).sample
        error = (predicted - (signal * noise - spread * latents)).square()
        weight = 1.0 + (object_weight - 1.0) * kept * object_cells(latents)
        return (weight * error).mean()


def object_cells(latents: Tensor) -> Tensor:
    """1 where a cell holds part of the object, else 0; (batch, 1, frames, rows, columns).

    Backgrounds are plain, so the object is what departs from its frame's median.
    """
    ground = latents.flatten(3).median(dim=3).values[..., None, None]
    return ((latents - ground).abs().mean(dim=1, keepdim=True) > 0.4).float()


@dataclass(frozen=True)
class Lap:
    """One period of a moving shape."""

    scene: MovingScene
    course: Course


def draw_laps(count: int, rng: np.random.Generator) -> list[Lap]:
    """Laps on random lines of scenes that are not held out, as many of each as can be."""
    world = [scene for scene in WORLD if not moving.is_held_out(scene)]
    order = np.concatenate([rng.permutation(len(world)) for _ in range(-(-count // len(world)))])
    return [Lap(world[index], moving.draw_course(world[index], rng)) for index in order[:count]]


class Clips:
    """Encoded laps, of which windows are drawn with a caption."""

    def __init__(self, vae: AutoencoderKL, plan: VideoPlan, folder: Path, step: int) -> None:
        """Encode `plan.laps` laps, or reuse the file of an earlier run; `step` seeds the order of windows."""
        self.laps = draw_laps(plan.laps, np.random.default_rng(plan.seed))
        self.dropout = plan.caption_dropout
        file = folder / f"laps_{plan.laps}_{plan.seed}.pt"
        if not file.exists():
            torch.save([encode_lap(vae, lap) for lap in tqdm(self.laps, "encode", mininterval=10.0)], file)
        self.latents: list[Tensor] = torch.load(file)
        self.rng = np.random.default_rng([plan.seed, step])

    def batch(self, size: int, frames: int) -> tuple[Tensor, list[str]]:
        """`size` random windows, float32 (batch, channels, frames, rows, columns), and a caption of each."""
        latents, texts = [], []
        for index in self.rng.integers(len(self.laps), size=size).tolist():
            lap = self.laps[index]
            latents.append(self.latents[index][self._window(lap, frames)].float().transpose(0, 1))
            texts.append(self._caption(lap.scene))
        return torch.stack(latents), texts

    def _window(self, lap: Lap, frames: int) -> np.ndarray:
        """Frame numbers of a clip, forwards or backwards: one run, or two or four runs from anywhere in the lap.

        Between runs no convolution over time can tell what the object is, so attention learns to: in a long video it
        sees frames that are far away.
        """
        period, sign = lap.course.period, self.rng.choice((-1, 1))
        runs = int(self.rng.choice((1, 2, 4))) if frames == FRAMES else 1
        starts = self.rng.integers(period, size=runs)
        order: np.ndarray = (starts[:, None] + sign * np.arange(frames // runs)).ravel() % period
        return order

    def _caption(self, scene: MovingScene) -> str:
        draw = self.rng.random
        if draw() < self.dropout:
            return ""
        silent = draw()  # of ten captions five name colour and shape, and two name neither
        return moving.caption(
            scene,
            colour=silent < 0.5 or 0.65 <= silent < 0.8,
            shape=silent < 0.65,
            motion=draw() < 0.7,
        )


def encode_lap(vae: AutoencoderKL, lap: Lap) -> Tensor:
    """Normalised latents of one period, float16 (frames, channels, rows, columns)."""
    return encode(vae, to_tensor(moving.render(lap.scene, lap.course, lap.course.period))).half()


def fit_video(plan: VideoPlan, folder: Path, resume: bool) -> None:
    """Train after the VAE of `folder`/vae; checkpoints, with averaged weights under "ema", go to `folder`/video.pt."""
    torch.manual_seed(plan.seed)
    video = TinyVideo()
    quicken(video.unet)
    trainer = Trainer(video, plan, folder / "video.pt")
    if resume:
        trainer.resume()
    vae = AutoencoderKL.from_pretrained(folder / "vae").eval()
    clips = Clips(vae, plan, folder, trainer.step)
    generator = torch.Generator().manual_seed(1000 * plan.seed + 100_000 * trainer.step)
    progress = tqdm(range(trainer.step, plan.steps), desc="video", mininterval=30.0)
    running = 1.0
    for step in progress:
        count, frames = plan.shape_at(step)
        with without_temporal(video.unet) if frames == 1 else nullcontext():
            loss = video.loss(*clips.batch(count, frames), generator, plan.object_weight)
            trainer.optimizer.zero_grad(set_to_none=True)
            loss.backward()
        trainer.update()
        running += 0.02 * (loss.item() - running)
        progress.set_postfix(loss=f"{running:.4f}", refresh=False)
        trainer.save()
