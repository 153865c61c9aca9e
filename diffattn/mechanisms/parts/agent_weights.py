"""The trained weights of agent attention: position biases on both logits, and a convolution of the values.

    B1[a, cell] = an[a, cell] + ah[a, row] + aw[a, column]     B1[a, other] = ac[a]
    B2[cell, a] = na[a, cell] + ha[row, a] + wa[column, a]     B2[other, a] = ca[a]
    out_cell   += depthwise 3 x 3 convolution of the cells of V

`an` and `na` are stored at 7 x 7, row and column biases at `window`; all are interpolated bilinearly to the grid and
are alike in all frames. Names and shapes are those of the published checkpoints: their `attn.*` entries load unchanged.

Source: Han et al., Agent Attention, https://arxiv.org/abs/2312.08874. Differences from the released code:
any grid (row and column biases are interpolated too), several frames, any number of other tokens.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diffattn.grid import TokenGrid

BIAS_SIZE = 7
INIT_STD = 0.02


class AgentWeights(nn.Module):
    """One layer's weights for `agents` agents. The convolution starts at zero, so a fresh swap is not disturbed by it.

    `others_ask`: other tokens ask the agents too, and have the bias `ca`.
    """

    an_bias: Tensor
    na_bias: Tensor
    ah_bias: Tensor
    aw_bias: Tensor
    ha_bias: Tensor
    wa_bias: Tensor
    ac_bias: Tensor
    ca_bias: Tensor

    def __init__(
        self, heads: int, head_dim: int, agents: int, *, bias: bool, depthwise_conv: bool, window: int, others_ask: bool
    ) -> None:
        super().__init__()
        shapes: dict[str, tuple[int, ...]] = {
            "an_bias": (heads, agents, BIAS_SIZE, BIAS_SIZE),
            "na_bias": (heads, agents, BIAS_SIZE, BIAS_SIZE),
            "ah_bias": (1, heads, agents, window, 1),
            "aw_bias": (1, heads, agents, 1, window),
            "ha_bias": (1, heads, window, 1, agents),
            "wa_bias": (1, heads, 1, window, agents),
            "ac_bias": (1, heads, agents, 1),
        }
        if others_ask:
            shapes["ca_bias"] = (1, heads, 1, agents)
        for name, shape in shapes.items() if bias else ():
            self.register_parameter(name, nn.Parameter(nn.init.trunc_normal_(torch.empty(shape), std=INIT_STD)))
        self.has_bias, self.others_ask = bias, others_ask
        self.dwc: nn.Conv2d | None = None
        if depthwise_conv:
            channels = heads * head_dim
            self.dwc = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)
            nn.init.zeros_(self.dwc.weight)
            nn.init.zeros_(self.dwc.bias)  # type: ignore[arg-type]

    def biases(self, grid: TokenGrid, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
        """B1 `(1, h, agents, tokens)` and B2 `(1, h, asking tokens, agents)` on `grid`."""
        if not self.has_bias:
            return None, None
        cells = on_cells(self.an_bias, self.ah_bias[0], self.aw_bias[0], grid)
        first = grid.join(cells, self.ac_bias.expand(-1, -1, -1, grid.others), dim=-1)
        rows, columns = self.ha_bias[0].movedim(-1, 1), self.wa_bias[0].movedim(-1, 1)  # h a y 1, h a 1 x
        second = on_cells(self.na_bias, rows, columns, grid).transpose(-1, -2)
        if self.others_ask:
            second = grid.join(second, self.ca_bias.expand(-1, -1, grid.others, -1))
        return first.to(dtype), second.to(dtype)

    def add_convolved(self, out: Tensor, v: Tensor, grid: TokenGrid) -> Tensor:
        """`out` `(b, h, n, c)` plus, on its cells, the convolution of `v`, frame by frame."""
        if self.dwc is None:
            return out
        batch, heads = v.shape[:2]
        cells, others = grid.split(v)
        pictures = cells.unflatten(-2, grid.shape).permute(0, 2, 1, 5, 3, 4)  # b f h c y x
        pictures = pictures.reshape(batch * grid.frames, -1, grid.height, grid.width)
        weight, bias = (parameter.to(v.dtype) for parameter in self.dwc.parameters())
        local = F.conv2d(pictures, weight, bias, padding=1, groups=len(weight))
        local = local.view(batch, grid.frames, heads, -1, grid.height, grid.width).permute(0, 2, 1, 4, 5, 3)
        return out + grid.join(local.flatten(2, 4), torch.zeros_like(others))


def on_cells(both: Tensor, rows: Tensor, columns: Tensor, grid: TokenGrid) -> Tensor:
    """Sum of `(h, a, Y, X)`, `(h, a, Y, 1)` and `(h, a, 1, X)`, each resized to the grid: `(1, h, a, cells)`."""
    sizes = ((both, (grid.height, grid.width)), (rows, (grid.height, 1)), (columns, (1, grid.width)))
    full, row, column = (F.interpolate(bias, size=size, mode="bilinear") for bias, size in sizes)
    return (full + row + column).flatten(2).repeat(1, 1, grid.frames)[None]
