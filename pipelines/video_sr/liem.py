"""Local information enhancement modules (LIEM) of STAR, and their places in the blocks of a 3D U-Net.

    spatial block     x + attn1(norm1(local1(x)))
    temporal block    x + attn1(norm1(local1(x))), then x + attn2(norm2(local2(x)))

A gate is one positive factor for each token, and the norm behind it divides by the token's own deviation: gates act
only where gate^2 var(x) comes near the eps of the norm, 1e-5. `gates.measure_gates` tells whether weights do.

Source: Xie et al., STAR, section 3.2 of https://arxiv.org/abs/2501.02976. The kernel of 7 and the order of the two
poolings are those of the released weights; the paper has a kernel of 3, and average before maximum.
"""

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import Transformer2DModel
from diffusers.models.transformers.transformer_temporal import TransformerTemporalModel
from torch import Tensor, nn


class LIEMSpatial(nn.Module):
    """Gate of each place by its neighbourhood.

    y = x sigmoid(conv([max_c x, mean_c x])),    zeros around the image
    """

    def __init__(self, kernel_size: int = 7) -> None:
        """`kernel_size` is odd, so that the image keeps its size."""
        super().__init__()
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"expected an odd kernel_size; got {kernel_size}; the released weights have 7")
        self.conv1 = nn.Conv2d(2, 1, kernel_size, padding=kernel_size // 2, bias=False)

    def gate(self, pictures: Tensor) -> Tensor:
        """(n, c, h, w) -> (n, 1, h, w) in 0..1."""
        gate: Tensor = torch.sigmoid(self.conv1(_pooled(pictures, dim=1)))
        return gate

    def forward(self, pictures: Tensor) -> Tensor:
        """(n, c, h, w) -> the same shape."""
        return pictures * self.gate(pictures)


class LIEMTemporal(nn.Module):
    """Gate of each token by itself.

    y = x sigmoid(w . [max_c x, mean_c x])
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Linear(2, 1, bias=False)

    def gate(self, tokens: Tensor) -> Tensor:
        """(n, tokens, c) -> (n, tokens, 1) in 0..1."""
        gate: Tensor = torch.sigmoid(self.conv1(_pooled(tokens, dim=-1)))
        return gate

    def forward(self, tokens: Tensor) -> Tensor:
        """(n, tokens, c) -> the same shape."""
        return tokens * self.gate(tokens)


def _pooled(x: Tensor, dim: int) -> Tensor:
    return torch.cat([x.amax(dim, keepdim=True), x.mean(dim, keepdim=True)], dim)


class SpatialGate:
    """Forward pre-hook of a norm over tokens that lie row by row on `grid`."""

    def __init__(self, local: LIEMSpatial) -> None:
        """`grid` is (rows, columns), set by `note_grid` in each forward of the transformer."""
        self.local = local
        self.grid: tuple[int, int] | None = None

    def note_grid(self, transformer: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Forward pre-hook of the transformer, which sees (n, c, rows, columns)."""
        pictures = args[0] if args else kwargs["hidden_states"]
        self.grid = (pictures.shape[-2], pictures.shape[-1])

    def __call__(self, norm: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        """(n, rows columns, c) -> the same shape."""
        if self.grid is None:
            raise ValueError("expected the grid of the tokens; got none; call the whole transformer, not its block")
        pictures = args[0].transpose(1, 2).unflatten(2, self.grid)
        return (self.local(pictures).flatten(2).transpose(1, 2),)


class TemporalGate:
    """Forward pre-hook of a norm over tokens."""

    def __init__(self, local: LIEMTemporal) -> None:
        self.local = local

    def __call__(self, norm: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        """(n, tokens, c) -> the same shape."""
        return (self.local(args[0]),)


def add_spatial(block: Any) -> SpatialGate:
    """Give a block of a spatial transformer its LIEM as `local1`; the gate still needs the grid."""
    block.local1 = LIEMSpatial()
    gate = SpatialGate(block.local1)
    block.norm1.register_forward_pre_hook(gate)
    return gate


def add_temporal(block: Any) -> None:
    """Give a block of a temporal transformer its LIEMs as `local1` and `local2`."""
    for i in (1, 2):
        local = LIEMTemporal()
        block.add_module(f"local{i}", local)
        block.get_submodule(f"norm{i}").register_forward_pre_hook(TemporalGate(local))


def add_liem(model: nn.Module) -> None:
    """Give every block of the spatial and temporal transformers in `model` its LIEMs, untrained."""
    for module in list(model.modules()):
        if isinstance(module, Transformer2DModel):
            for block in module.transformer_blocks:
                module.register_forward_pre_hook(add_spatial(block).note_grid, with_kwargs=True)
        elif isinstance(module, TransformerTemporalModel):
            for block in module.transformer_blocks:
                add_temporal(block)
