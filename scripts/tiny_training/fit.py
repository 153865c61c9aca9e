"""What every training of a tiny denoiser shares: how fast, how often, averaged weights and checkpoints."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How long and how fast to train."""

    steps: int
    batch_size: int
    rate: float
    warmup: int = 200
    decay: float = 0.2
    ema: float = 0.998
    caption_dropout: float
    save_every: int = 250
    seed: int = 0

    def rate_at(self, step: int) -> float:
        """Learning rate of a step: linear warm-up, constant, then linear to zero over the last `decay` share."""
        left = (self.steps - step) / (self.decay * self.steps)
        return self.rate * min(1.0, (step + 1) / self.warmup, left)


class Trainer:
    """AdamW and averaged weights of `model`, with a checkpoint in `file`."""

    def __init__(self, model: nn.Module, plan: Plan, file: Path) -> None:
        """Start at step 0 with the model's own weights."""
        self.model, self.plan, self.file, self.step = model, plan, file, 0
        self.parameters = list(model.parameters())
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=plan.rate, betas=(0.9, 0.98), weight_decay=0.01, fused=True
        )
        self.averaged = [parameter.detach().clone() for parameter in self.parameters]

    def resume(self) -> None:
        """Go on from the checkpoint, if there is one."""
        if self.file.exists():
            state = torch.load(self.file)
            self.model.load_state_dict(state["flow"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.averaged, self.step = state["ema"], state["step"]

    def update(self) -> None:
        """Take a step along the gradients in place, and average."""
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = self.plan.rate_at(self.step)
        self.optimizer.step()
        weight = max(1.0 - self.plan.ema, 1.0 / (self.step + 10))
        torch._foreach_lerp_(self.averaged, [parameter.detach() for parameter in self.parameters], weight)
        self.step += 1

    def save(self) -> None:
        """Write the checkpoint where it is time to: every `save_every` steps and at the end."""
        if self.step % self.plan.save_every and self.step != self.plan.steps:
            return
        state = {"flow": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "ema": self.averaged}
        save_checkpoint(self.file, step=self.step, **state)


def save_checkpoint(file: Path, **state: object) -> None:
    """Write a checkpoint beside `file`, then put it in place in one rename."""
    partial = file.with_suffix(".partial")
    torch.save(state, partial)
    os.replace(partial, file)


def load_averaged(model: nn.Module, file: Path) -> None:
    """Give `model` the averaged weights of a checkpoint."""
    averaged: Sequence[Tensor] = torch.load(file)["ema"]
    for parameter, mean in zip(model.parameters(), averaged, strict=True):
        parameter.data.copy_(mean)
