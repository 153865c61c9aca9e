"""A tiny random Flux, samples of noise, and configs for training tests."""

from typing import Any

import torch
from diffattn.distill.config import DistillConfig
from diffattn.distill.data.samples import Sample
from diffattn.distill.training.losses import LossWeights
from diffusers import FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from torch import Tensor

from diffattn import ClearAttention

TEXT, WIDTH, POOLED = 5, 24, 20


class Noise:
    """`count` samples of Gaussian latents, each the same at every visit."""

    def __init__(self, count: int = 11, height: int = 12, width: int = 8) -> None:
        self.count, self.shape = count, (4, height, width)

    def __len__(self) -> int:
        return self.count

    def sample(self, index: int, generator: torch.Generator) -> Sample:
        own = torch.Generator().manual_seed(index)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=own)

        conditioning = {"encoder_hidden_states": draw(TEXT, WIDTH), "pooled_projections": draw(POOLED)}
        return Sample(f"sample {index}", draw(*self.shape), conditioning)


def flux_model() -> FluxTransformer2DModel:
    torch.manual_seed(3)
    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=3,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=POOLED,
        axes_dims_rope=(4, 6, 6),
    )


def scheduler() -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler()


def config(**changes: Any) -> DistillConfig:
    values: dict[str, Any] = {
        "model": "toy",
        "mechanism": ClearAttention(radius=2),
        "loss": LossWeights(),
        "steps": 6,
        "batch_size": 4,
        "rate": 1e-3,
        "save_every": 3,
    }
    return DistillConfig(**{**values, **changes})
