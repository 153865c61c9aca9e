"""Training of the tiny Wan transformer and its text encoder by flow matching on latents.

    x = (1 - sigma) latents + sigma noise        target = noise - latents

Cheaper first: single frames, then the first latent frames of clips, then some latent frames from all over a clip at
their own positions, then whole clips. Wan's VAE is causal, so the first latent frames of a clip are the latents of its
beginning.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLWan, WanPipeline, WanTransformer3DModel
from torch import Tensor, nn
from tqdm import tqdm

from diffattn.tiny import moving
from diffattn.tiny.moving import MovingScene
from diffattn.tiny.shapes import to_tensor
from tiny_training.fit import Plan, Trainer
from tiny_training.fit_vae import mixed_precision
from tiny_training.fit_video import object_cells
from tiny_training.fit_wan_vae import encode
from tiny_training.text import MAX_VIDEO_TOKENS, t5_tokenizer, video_caption_words
from tiny_training.wan_parts import FRAMES, LATENT_FRAMES, build_umt5, build_wan

LENGTHS, CHANCES = (MAX_VIDEO_TOKENS, 64, 512), (0.8, 0.15, 0.05)
"""Text tokens with the padding by zeros that the pipeline adds and the model sees, and how often each is drawn."""


@dataclass(frozen=True, kw_only=True)
class WanPlan(Plan):
    """How long and how fast to train; `batch_size` counts whole clips."""

    steps: int = 8200
    picture_steps: int = 2500
    """Steps on single frames, the first of all."""
    short_steps: int = 2500
    """Steps on the first `short_frames` latent frames, after those on single frames."""
    short_frames: int = 3
    spread_steps: int = 2000
    """Steps on `spread_frames` of all latent frames, after those on short clips."""
    spread_frames: int = 4
    batch_size: int = 3
    clips: int = 1536
    """Encoded clips."""
    rate: float = 1.5e-3
    ema: float = 0.998
    caption_dropout: float = 0.1
    object_weight: float = 4.0
    """Weight of the object's cells in the loss, where there is no noise."""

    def shape_at(self, step: int) -> tuple[int, int]:
        """Clips and latent frames of each in a step's batch; fewer frames leave room for more clips."""
        if step < self.picture_steps:
            return 11 * self.batch_size, 1
        if step < self.picture_steps + self.short_steps:
            return 3 * self.batch_size, self.short_frames
        if step < self.first_whole_step:
            return 3 * self.batch_size, self.spread_frames
        return self.batch_size, LATENT_FRAMES

    @property
    def first_whole_step(self) -> int:
        """The first step on whole clips."""
        return self.picture_steps + self.short_steps + self.spread_steps

    def spreads(self, step: int) -> bool:
        """Are a step's latent frames from all over a clip?"""
        return self.picture_steps + self.short_steps <= step


class TinyWan(nn.Module):
    """Everything that is trained on latents."""

    def __init__(self) -> None:
        """Build untrained parts."""
        super().__init__()
        self.tokenizer = t5_tokenizer(video_caption_words())
        self.text = build_umt5(self.tokenizer)
        self.transformer = build_wan()

    def encode(self, texts: Sequence[str], length: int = MAX_VIDEO_TOKENS) -> Tensor:
        """Text states (batch, length, TEXT_DIM), zero behind each caption, as the pipeline gives them."""
        options = {"padding": "max_length", "max_length": MAX_VIDEO_TOKENS, "truncation": True, "return_tensors": "pt"}
        tokens = self.tokenizer(list(texts), **options)
        states = self.text(tokens.input_ids, tokens.attention_mask).last_hidden_state
        states = states * tokens.attention_mask[..., None]
        return nn.functional.pad(states, (0, 0, 0, length - states.shape[1]))

    def loss(
        self,
        latents: Tensor,
        texts: Sequence[str],
        generator: torch.Generator,
        object_weight: float,
        length: int,
        places: Tensor | None = None,
    ) -> Tensor:
        """Mean squared error of the velocity for latents (batch, channels, frames, rows, columns).

        `places` are the frames' numbers in their clip; None: it begins with them.

        sigma = sigmoid(0.7 + 1.4 normal). The object's cells weigh 1 + (object_weight - 1) (1 - sigma)^2: more, but not
        while noise still hides where it is.
        """
        noise = torch.randn(latents.shape, generator=generator)
        sigma = torch.sigmoid(0.7 + 1.4 * torch.randn(len(latents), generator=generator)).view(-1, 1, 1, 1, 1)
        with mixed_precision(), placed(self.transformer, places):
            predicted = self.transformer(
                hidden_states=(1.0 - sigma) * latents + sigma * noise,
                timestep=1000.0 * sigma.flatten(),
                encoder_hidden_states=self.encode(texts, length),
                return_dict=False,
            )[0]
        error = (predicted.float() - (noise - latents)).square()
        weight = 1.0 + (object_weight - 1.0) * (1.0 - sigma).square() * object_cells(latents)
        return (weight * error).mean()


@contextlib.contextmanager
def placed(transformer: WanTransformer3DModel, places: Tensor | None) -> Iterator[None]:
    """Inside the block the frames of a call have the rotary positions of `places`."""
    if places is None:
        yield
        return

    def of_places(rope: nn.Module, args: tuple[Tensor], tables: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        (latents,) = args
        whole = rope.forward(latents.new_empty(1, 1, int(places.max()) + 1, *latents.shape[3:]))
        return tuple(table.unflatten(1, (-1, latents[0, 0, 0].numel()))[:, places].flatten(1, 2) for table in whole)

    hook = transformer.rope.register_forward_hook(of_places)
    try:
        yield
    finally:
        hook.remove()


class WanClips:
    """Encoded clips of scenes that are not set apart, with captions drawn anew each time."""

    def __init__(self, vae: AutoencoderKLWan, plan: WanPlan, folder: Path, step: int) -> None:
        """Encode `plan.clips` clips, or reuse the file of an earlier run; `step` seeds the order of batches."""
        rng = np.random.default_rng(plan.seed)
        world = [scene for scene in moving.scenes() if not moving.is_set_apart(scene)]
        order = np.concatenate([rng.permutation(len(world)) for _ in range(-(-plan.clips // len(world)))])
        self.scenes = [world[index] for index in order[: plan.clips]]
        self.dropout = plan.caption_dropout
        file = folder / f"clips_{plan.clips}_{plan.seed}.pt"
        if not file.exists():
            chosen = tqdm(self.scenes, "encode", mininterval=15.0)
            torch.save(torch.cat([encode_clip(vae, scene, rng) for scene in chosen]), file)
        self.latents: Tensor = torch.load(file, mmap=True)
        self.rng = np.random.default_rng([plan.seed, step])

    def batch(self, size: int, frames: int, spread: bool) -> tuple[Tensor, list[str], int, Tensor]:
        """Latent frames of random clips, a caption of each, how many text tokens there are, and the frames' numbers.

        They are a clip's first ones or, `spread`, any of them, often the first among them.
        """
        chosen = self.rng.integers(len(self.scenes), size=size)
        places = np.arange(frames)
        if spread:
            first = int(self.rng.random() < 0.7)
            places = np.sort(self.rng.choice(np.arange(first, LATENT_FRAMES), frames - first, replace=False))
            places = np.concatenate([np.zeros(first, dtype=int), places])
        latents = self.latents[torch.from_numpy(chosen)][:, :, places].float()
        length = int(self.rng.choice(LENGTHS, p=CHANCES))
        return latents, [self._caption(self.scenes[index]) for index in chosen], length, torch.from_numpy(places)

    def _caption(self, scene: MovingScene) -> str:
        draw = self.rng.random
        if draw() < self.dropout:
            return ""
        return moving.caption(scene, colour=draw() < 0.85, shape=draw() < 0.85, motion=draw() < 0.85)


def encode_clip(vae: AutoencoderKLWan, scene: MovingScene, rng: np.random.Generator) -> Tensor:
    """Normalised latents of a clip on a random course, float16 (1, channels, frames, rows, columns)."""
    clip = to_tensor(moving.render(scene, moving.draw_course(scene, rng), FRAMES)).transpose(0, 1)
    return encode(vae, clip[None]).half()


def take_up(trainer: Trainer, wan: TinyWan, plan: WanPlan, pipeline: Path) -> None:
    """Start the trainer of `wan` with the weights of a pipeline's folder, at its first step on whole clips."""
    own = WanPipeline.from_pretrained(pipeline)
    wan.text.load_state_dict(own.text_encoder.state_dict())
    wan.transformer.load_state_dict(own.transformer.state_dict())
    trainer.averaged = [parameter.detach().clone() for parameter in trainer.parameters]
    trainer.step = plan.first_whole_step


def fit_wan(plan: WanPlan, folder: Path, *, resume: bool = False, start: Path | None = None) -> None:
    """Train after the VAE of `folder`/vae; checkpoints, with averaged weights under "ema", go to `folder`/wan.pt.

    `resume` goes on from the last checkpoint; `start` on whole clips from the weights of a pipeline's folder.
    """
    torch.manual_seed(plan.seed)
    wan = TinyWan()
    trainer = Trainer(wan, plan, folder / "wan.pt")
    if start is not None:
        take_up(trainer, wan, plan, start)
    if resume:
        trainer.resume()
    clips = WanClips(AutoencoderKLWan.from_pretrained(folder / "vae").eval(), plan, folder, trainer.step)
    generator = torch.Generator().manual_seed(1000 * plan.seed + 100_000 * trainer.step)
    progress = tqdm(range(trainer.step, plan.steps), desc="wan", mininterval=30.0)
    running = 1.0
    for step in progress:
        size, frames = plan.shape_at(step)
        latents, texts, length, places = clips.batch(size, frames, plan.spreads(step) and frames < LATENT_FRAMES)
        loss = wan.loss(latents, texts, generator, plan.object_weight, length, places)
        trainer.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        trainer.update()
        running += 0.02 * (loss.item() - running)
        progress.set_postfix(loss=f"{running:.4f}", refresh=False)
        trainer.save()
