"""The trained weights of linear attention: feature maps of queries and keys, and the local residual.

    phi_q(x) = [exp(W_q x), exp(-W_q x)]        phi_k likewise; one W for each head, the identity at first
    residual_i = sum_o r_o v_{i + o}            o: offsets of a small box around cell i; outside the grid v is 0
    r = W_2 gelu(W_1 m + b_1) + b_2             m: mean of v over the cells; per head; W_2 and b_2 zero at first

Source: the maps are those of Zhang et al., The Hedgehog & the Porcupine, https://arxiv.org/abs/2402.04347; the residual
that of Han et al., Bridging the Divide, section 4.2, https://arxiv.org/abs/2412.06590. Differences: one to three axes;
`m` is the mean of the values, which are a linear map of the tokens that the paper averages, and leaves other tokens
out; W_1 starts as the identity.
"""

import itertools
import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diffattn.grid import TokenGrid


class LinearWeights(nn.Module):
    """One layer's weights. At their start the maps are [exp(x), exp(-x)] and the residual is zero.

    `residual`: frames, rows and columns of the local box, odd, or None.
    """

    q_map: Tensor
    k_map: Tensor
    hidden_weight: Tensor
    hidden_bias: Tensor
    kernel_weight: Tensor
    kernel_bias: Tensor

    def __init__(self, heads: int, head_dim: int, *, maps: bool, residual: tuple[int, int, int] | None) -> None:
        super().__init__()
        self.has_maps, self.residual = maps, residual
        identity = torch.eye(head_dim).repeat(heads, 1, 1)
        starts: dict[str, Tensor] = {}
        if maps:
            starts |= {"q_map": identity, "k_map": identity}
        if residual is not None:
            offsets = math.prod(residual)
            starts |= {
                "hidden_weight": identity,
                "hidden_bias": torch.zeros(heads, head_dim),
                "kernel_weight": torch.zeros(heads, head_dim, head_dim, offsets),
                "kernel_bias": torch.zeros(heads, head_dim, offsets),
            }
        for name, start in starts.items():
            self.register_parameter(name, nn.Parameter(start.clone()))

    def map_logs(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Logarithms of the features of `q` and `k` `(b, h, n, d)`, each `(b, h, n, 2 d)`."""
        return plus_minus(q @ self.q_map.to(q)), plus_minus(k @ self.k_map.to(k))

    def kernel(self, values: Tensor, visible: Tensor | None) -> Tensor:
        """The residual's kernel `(b, h, c, offsets)` for cells `(b, h, cells, c)`."""
        hidden_weight, hidden_bias, weight, bias = (
            parameter.to(values)
            for parameter in (self.hidden_weight, self.hidden_bias, self.kernel_weight, self.kernel_bias)
        )
        mean = values.mean(dim=-2)
        if visible is not None:
            # hidden values are 0 already
            mean = mean * (values.shape[-2] / visible.sum(dim=-2).clamp(min=1))
        hidden = F.gelu(torch.einsum("bhd,hde->bhe", mean, hidden_weight) + hidden_bias)
        return torch.einsum("bhe,heco->bhco", hidden, weight) + bias

    def local(self, v: Tensor, grid: TokenGrid, visible: Tensor | None = None) -> Tensor:
        """The residual `(b, h, cells, c)` of `v` `(b, h, n, c)`; tokens that are not `visible` `(b, h, n, 1)` are 0."""
        assert self.residual is not None
        values, seen = self._visible_cells(v, grid, visible)
        kernel = self.kernel(values, seen)
        around = [width for side in reversed(self.residual) for width in (side // 2, side // 2)]
        padded = F.pad(values.unflatten(-2, grid.shape), [0, 0, *around])  # b h f y x c
        out = torch.zeros_like(values).unflatten(-2, grid.shape)
        for offset, (frame, row, column) in enumerate(itertools.product(*map(range, self.residual))):
            moved = padded[:, :, frame : frame + grid.frames, row : row + grid.height, column : column + grid.width]
            out = torch.addcmul(out, moved, kernel[..., offset][:, :, None, None, None])
        return out.flatten(2, 4)

    def local_reference(self, v: Tensor, grid: TokenGrid, visible: Tensor | None = None) -> Tensor:
        """The same by one dense matrix of neighbours for each offset."""
        assert self.residual is not None
        values, seen = self._visible_cells(v, grid, visible)
        kernel = self.kernel(values, seen)
        out = torch.zeros_like(values)
        for offset, neighbours in enumerate(neighbour_matrices(grid, self.residual)):
            out = out + kernel[:, :, None, :, offset] * (neighbours.to(values) @ values)
        return out

    def _visible_cells(self, v: Tensor, grid: TokenGrid, visible: Tensor | None) -> tuple[Tensor, Tensor | None]:
        values = v[..., grid.cell_slice, :]
        if visible is None:
            return values, None
        seen = visible.to(v.dtype).expand(*visible.shape[:-2], grid.tokens, 1)[..., grid.cell_slice, :]
        return values * seen, seen


def plus_minus(x: Tensor) -> Tensor:
    """`[x, -x]` along the last axis."""
    return torch.cat([x, -x], dim=-1)


def neighbour_matrices(grid: TokenGrid, box: tuple[int, int, int]) -> Iterator[Tensor]:
    """For each offset in `box`, `(cells, cells)` booleans: is the second cell the first one's neighbour there?"""
    steps = [axis[None, :] - axis[:, None] for axis in grid.positions()]
    for place in itertools.product(*map(range, box)):
        yield math.prod(
            (step == here - side // 2 for step, here, side in zip(steps, place, box, strict=True)),
            start=torch.tensor(True),
        )
