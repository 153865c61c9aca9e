"""CogVideoX's joint attention with STAR's gates (LIEM) on the tokens of the image.

    z = temporal(spatial(x)),    q, k, v of [text, z]

x are the picture's tokens after norm1 and its modulation by the timestep; text tokens are not gated. Unlike in the
U-Net, no LayerNorm follows the gates before the projections, so they scale the values: q and k have norms of their own.

The gates are submodules of the attention itself, between norm1 and the projections. In an attention processor they
would keep `diffattn.apply` out: it runs a processor's own call with the softmax in it exchanged, and a processor that
hands on to the stock one has no softmax of its own. A wrapper around norm1 is not told the grid of tokens. The module
gets it with the call, and its processor stays the stock one: any exchange of processors, mechanisms or backends leaves
the gates at work.

Source: Xie et al., STAR, 2025, https://arxiv.org/abs/2501.02976, Sec. 3.2 and Eq. 3.
"""

from typing import Any

from diffusers.models.attention_processor import Attention
from torch import Tensor

from ..liem import LIEMSpatial, LIEMTemporal

Grid = tuple[int, int, int]
"""Frames, rows and columns of the picture's tokens."""


class STARCogVideoXAttention(Attention):  # type: ignore[misc]
    """Stock attention whose first argument, the picture's tokens, is gated. Takes the stock settings."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.spa_local = LIEMSpatial()
        self.temp_local = LIEMTemporal()

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        grid: Grid,
        **kwargs: Any,
    ) -> Any:
        """The stock forward of gated tokens (b, frames rows columns, c); frame by frame, each row by row."""
        gated = self.gate(hidden_states, grid)
        return super().forward(gated, encoder_hidden_states, attention_mask, **kwargs)

    def gate(self, tokens: Tensor, grid: Grid) -> Tensor:
        """Tokens (b, n, c) times the gate of their place in the frame, and then that of each token."""
        frames, rows, columns = grid
        if tokens.shape[1] != frames * rows * columns:
            raise ValueError(
                f"expected tokens of a grid of {frames} x {rows} x {columns}; got {tokens.shape[1]}; give the whole "
                "sequence to each attention"
            )
        maps = tokens.reshape(-1, rows, columns, tokens.shape[2]).permute(0, 3, 1, 2)
        gated: Tensor = self.temp_local(self.spa_local(maps).permute(0, 2, 3, 1).reshape(tokens.shape))
        return gated
