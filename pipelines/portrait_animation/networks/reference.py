"""Reference attention: every spatial transformer of the U-Net also looks at the reference.

    written by block i of the appearance network    r_i = norm1(x)
    read by block i of the U-Net                     softmax(q k^T / sqrt(d)) v,   q = W_q y,  k, v = W_k,v [y, r_i]

with y the block's own norm1 output and [ , ] along the tokens: the weights are the U-Net's own, for k and v of the
reference too. Blocks are counted in the order of computation: down, middle, up.

Cost: with R references, self-attention has (1 + R) times as many keys.
Source: Xie et al., X-Portrait, section 3.2, https://arxiv.org/abs/2403.15931.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

Processor = Any
"""Of diffusers: computes an `Attention` when called."""


@dataclass(frozen=True)
class Writer:
    """A processor that appends what its attention layer gets to `entries`, and computes it as before."""

    inner: Processor
    entries: list[Tensor]

    def __call__(self, attention: Attention, hidden_states: Tensor, *args: Any, **options: Any) -> Tensor:
        """Self-attention, (batch, tokens, width) -> the same shape."""
        self.entries.append(hidden_states)
        out: Tensor = self.inner(attention, hidden_states, *args, **options)
        return out


@dataclass(frozen=True)
class Reader:
    """A processor that lets a self-attention layer also attend to `entry`, (part of the batch, tokens, width)."""

    inner: Processor
    entry: Tensor

    def __call__(
        self, attention: Attention, hidden_states: Tensor, encoder_hidden_states: None = None, **options: Any
    ) -> Tensor:
        """Self-attention, (batch, tokens, width) -> the same shape; samples take the entries in turn."""
        entry = self.entry.repeat(len(hidden_states) // len(self.entry), 1, 1)
        keys = torch.cat([hidden_states, entry.to(hidden_states)], dim=1)
        out: Tensor = self.inner(attention, hidden_states, encoder_hidden_states=keys, **options)
        return out


@dataclass(frozen=True)
class ReferenceBank:
    """What the appearance network makes of references at one timestep."""

    entries: Sequence[Tensor]
    """One for each transformer block, (batch, tokens, width)."""

    @classmethod
    def write(cls, network: nn.Module, latents: Tensor, timestep: Tensor | int, text: Tensor) -> "ReferenceBank":
        """Run the appearance network.

        Args:
            network: a `UNet2DConditionModel`.
            latents: of the references, scaled, (batch, 4, rows, columns).
            timestep: that of the latents being denoised, though these have no noise.
            text: (1, tokens, width).
        """
        entries: list[Tensor] = []
        layers = self_attentions(network)
        with replaced(layers, [Writer(layer.processor, entries) for layer in layers]):
            network(latents, timestep, text.expand(len(latents), -1, -1))
        return cls(entries)

    def joined(self, references: int) -> "ReferenceBank":
        """The first axis of the batch, `references` long, as more tokens of one reference."""
        apart = (entry.unflatten(0, (references, -1)) for entry in self.entries)
        return ReferenceBank([entry.transpose(0, 1).flatten(1, 2) for entry in apart])

    @contextlib.contextmanager
    def read_by(self, unet: nn.Module) -> Iterator[None]:
        """In this block, `unet` looks at the references."""
        layers = self_attentions(unet)
        if len(layers) != len(self.entries):
            raise ValueError(
                f"expected a U-Net with {len(self.entries)} transformer blocks, as the appearance network has; got "
                f"{len(layers)}; take both from one checkpoint"
            )
        readers = [Reader(layer.processor, entry) for layer, entry in zip(layers, self.entries, strict=True)]
        with replaced(layers, readers):
            yield


def self_attentions(network: Any) -> list[Attention]:
    """Spatial self-attention layers in the order of computation."""
    return [
        block.attn1
        for part in (*network.down_blocks, network.mid_block, *network.up_blocks)
        for transformer in getattr(part, "attentions", ())
        for block in transformer.transformer_blocks
    ]


@contextlib.contextmanager
def replaced(layers: Sequence[Attention], processors: Sequence[Processor]) -> Iterator[None]:
    """Give layers other processors, until the end of the block."""
    before = [layer.processor for layer in layers]
    for layer, processor in zip(layers, processors, strict=True):
        layer.processor = processor
    try:
        yield
    finally:
        for layer, processor in zip(layers, before, strict=True):
            layer.processor = processor
