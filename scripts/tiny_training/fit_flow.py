"""Training of the tiny Flux transformer and its text encoders by flow matching on latents.

Worker processes of one thread each share the work: every worker encodes and trains on its own images, and gradients
are averaged after each step. Training starts on images of half the side, four times cheaper, and ends at native size.
"""

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from diffusers import AutoencoderKL, FluxPipeline
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

from diffattn.parallel.operations.collectives import leave_group
from diffattn.tiny.shapes import SIDE, Scene, captions, is_held_out, scenes
from tiny_training.components import build_clip, build_t5, build_transformer
from tiny_training.fast_flux import FastFlux, zero_modulation
from tiny_training.fit import Plan, Trainer
from tiny_training.fit_vae import encode_scenes
from tiny_training.text import MAX_TOKENS, caption_words, clip_tokenizer, t5_tokenizer

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class FlowPlan(Plan):
    """How long and how fast to train; `batch_size` and `pictures` count per worker."""

    steps: int = 14500
    small_steps: int = 8400
    batch_size: int = 16
    pictures: int = 5000
    rate: float = 1.5e-3
    caption_dropout: float = 0.05
    object_weight: float = 5.0
    """Weight of the object's tokens in the loss."""
    workers: int = 2
    compiled: bool = False
    start: Path | None = None
    """Folder of a trained pipeline whose weights to start from; None for new ones."""


class TinyText(nn.Module):
    """Both tokenizers and text encoders: captions to T5 tokens and a pooled CLIP vector."""

    def __init__(self) -> None:
        """Build untrained encoders for the captions' vocabulary."""
        super().__init__()
        words = caption_words()
        self.tokenizer, self.tokenizer_2 = clip_tokenizer(words), t5_tokenizer(words)
        self.clip, self.t5 = build_clip(self.tokenizer), build_t5(self.tokenizer_2)

    def forward(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Encode `texts` to (batch, MAX_TOKENS, T5_DIM) tokens and (batch, CLIP_DIM) pooled vectors."""
        options = {"padding": "max_length", "max_length": MAX_TOKENS, "truncation": True, "return_tensors": "pt"}
        pooled = self.clip(self.tokenizer(list(texts), **options).input_ids).pooler_output
        return self.t5(self.tokenizer_2(list(texts), **options).input_ids)[0], pooled


class TinyFlow(nn.Module):
    """Everything that flow matching trains."""

    def __init__(self) -> None:
        """Build untrained parts."""
        super().__init__()
        self.text = TinyText()
        self.transformer = build_transformer()
        zero_modulation(self.transformer)
        self.fast = FastFlux(self.transformer)

    def load_pipeline(self, folder: Path) -> None:
        """Take the weights of the FluxPipeline in `folder`, whose vocabulary must be this one."""
        pipeline = FluxPipeline.from_pretrained(folder, torch_dtype=torch.float32)
        self.text.clip.load_state_dict(pipeline.text_encoder.state_dict())
        self.text.t5.load_state_dict(pipeline.text_encoder_2.state_dict())
        self.transformer.load_state_dict(pipeline.transformer.state_dict())

    def loss(self, latents: Tensor, texts: Sequence[str], generator: torch.Generator, object_weight: float) -> Tensor:
        """Mean squared error of the velocity at random noise levels, `object_weight` times as heavy on the object.

        x = (1 - sigma) latents + sigma noise, target = noise - latents, sigma = sigmoid(0.7 + 1.4 normal).
        Places are decided above sigma = 0.9 and outlines below it: one image in seven is noised above it.
        """
        noise = torch.randn(latents.shape, generator=generator)
        sigma = torch.sigmoid(0.7 + 1.4 * torch.randn(len(latents), generator=generator))
        blend = sigma[:, None, None, None]
        noisy = pack((1.0 - blend) * latents + blend * noise)
        error = (self.fast(noisy, sigma, *self.text(texts)) - pack(noise - latents)).square()
        weight = 1.0 + (object_weight - 1.0) * object_tokens(latents)
        return (weight * error).mean()


def pack(latents: Tensor) -> Tensor:
    """Latents (batch, channels, side, side) as tokens of 2 x 2 patches (batch, side * side / 4, 4 * channels)."""
    patches = functional.pixel_unshuffle(latents, 2)
    return patches.flatten(2).transpose(1, 2)


def object_tokens(latents: Tensor) -> Tensor:
    """1 where a token's patch holds part of the object, else 0; (batch, tokens, 1).

    Backgrounds do not change along a row of latents, so the object is what departs from its row's median.
    """
    departure = (latents - latents.median(dim=3, keepdim=True).values).abs().mean(dim=1, keepdim=True)
    patches = functional.max_pool2d(departure, 2)
    return (patches > 0.4).float().flatten(2).transpose(1, 2)


class Pictures:
    """The latents of one worker's training images at one size, with captions drawn anew each time."""

    def __init__(self, vae: AutoencoderKL, side: int, plan: FlowPlan, rank: int, folder: Path, step: int) -> None:
        """Encode `plan.pictures` images that are not held out, or reuse the file of an earlier run.

        `step` is the first to draw from them; it seeds the order of batches, so that a resumed run sees new ones.
        """
        rng = np.random.default_rng([plan.seed, rank, side])
        world = [scene for scene in scenes() if not is_held_out(scene)]
        self.scenes = [world[i] for i in rng.integers(len(world), size=plan.pictures)]
        self.dropout = plan.caption_dropout
        file = folder / f"latents_{side}_{rank}_{plan.pictures}.pt"
        if not file.exists():
            torch.save(self._encode(vae, side, rng), file)
        self.latents = torch.load(file, mmap=True)
        self.rng = np.random.default_rng([plan.seed, rank, side, step])

    def _encode(self, vae: AutoencoderKL, side: int, rng: np.random.Generator) -> Tensor:
        starts = tqdm(range(0, len(self.scenes), 25), desc=f"encode {side}", mininterval=10.0)
        parts = [encode_scenes(vae, self.scenes[i : i + 25], rng, side).half() for i in starts]
        return torch.cat(parts)

    def batch(self, size: int) -> tuple[Tensor, list[str]]:
        """Latents of `size` random images and a caption of each, empty for a share `dropout` of them."""
        chosen = self.rng.integers(len(self.scenes), size=size)
        return self.latents[torch.from_numpy(chosen)].float(), [self._caption(self.scenes[i]) for i in chosen]

    def _caption(self, scene: Scene) -> str:
        texts = captions(scene)
        return "" if self.rng.random() < self.dropout else texts[self.rng.integers(len(texts))]


def average_gradients(parameters: Sequence[nn.Parameter], workers: int) -> None:
    """Replace every gradient by its mean over the workers."""
    if workers == 1:
        return
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    flat.div_(workers)
    for gradient, mean in zip(gradients, flat.split([gradient.numel() for gradient in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))


def fit_flow(rank: int, plan: FlowPlan, folder: Path, resume: bool, niceness: int) -> None:
    """One worker's training; worker 0 writes `folder`/flow.pt with the averaged weights under "ema"."""
    os.nice(niceness)
    torch.set_num_threads(1)
    if plan.workers > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/workers", rank=rank, world_size=plan.workers)
    vae = AutoencoderKL.from_pretrained(folder / "vae").eval()
    torch.manual_seed(plan.seed)
    flow = TinyFlow()
    if plan.start is not None:
        flow.load_pipeline(plan.start)
    if plan.compiled:
        flow.transformer.compile_repeated_blocks(dynamic=False)
    trainer = Trainer(flow, plan, folder / "flow.pt")
    if resume:
        trainer.resume()
    first = trainer.step
    generator = torch.Generator().manual_seed(1000 * plan.seed + 100_000 * first + rank)
    pictures: Pictures | None = None
    progress = tqdm(range(first, plan.steps), desc="flow", disable=rank > 0, mininterval=10.0)
    running = 1.0
    for step in progress:
        if pictures is None or step == plan.small_steps:
            side = SIDE // 2 if step < plan.small_steps else SIDE
            pictures = Pictures(vae, side, plan, rank, folder, step)
        loss = flow.loss(*pictures.batch(plan.batch_size), generator, plan.object_weight)
        trainer.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        average_gradients(trainer.parameters, plan.workers)
        trainer.update()
        running += 0.02 * (loss.item() - running)
        progress.set_postfix(loss=f"{running:.4f}", refresh=False)
        if rank == 0:
            trainer.save()
    leave_group()
