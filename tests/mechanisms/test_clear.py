"""What is special about CLEAR: its circle, its pooled keys, its scales, its published costs."""

import math

import pytest
import torch
from tolerances import assert_close
from torch import Tensor

from diffattn import ClearAttention, TokenGrid
from diffattn.kernels.pattern import shift_invariant
from diffattn.mechanisms.base import Context
from diffattn.mechanisms.clear import PooledKeys
from diffattn.mechanisms.softmax import softmax_reference


@pytest.mark.parametrize(
    ("radius", "tokens"), [(1, 1), (2, 9), (3, 25), (4, 45), (8, 193), (16, 793), (32, 3205)], ids=str
)
def test_tokens_in_a_window_away_from_borders(radius: int, tokens: int) -> None:
    grid = TokenGrid(2 * radius + 1, 2 * radius + 1)
    pattern = ClearAttention(radius=radius).pattern(grid)
    assert pattern.pairs(TokenGrid(1, 1)) == 1
    big = TokenGrid(200, 200)  # pairs grow by one whole window for each further inner cell
    more = [pattern.pairs(TokenGrid(200 + i, 200 + j)) for i in (0, 1) for j in (0, 1)]
    assert more[3] - more[1] - more[2] + more[0] == tokens
    assert pattern.pairs(grid) < grid.cells * tokens or radius == 1
    assert pattern.pairs(big) == more[0]


@pytest.mark.parametrize(
    ("side", "radius", "gflops"),
    # GFLOPs a layer in the paper's tables; for radius 16 at 64 tokens it prints 80.6 where its own formula gives 86.6
    [(64, 8, 63.5), (64, 16, 86.6), (64, 32, 154.1), (128, 8, 246.2), (128, 32, 724.3), (256, 16, 1433.2)],
)
def test_published_costs(side: int, radius: int, gflops: float) -> None:
    flops = ClearAttention(radius=radius).flops(TokenGrid(side, side, before=512), heads=24, head_dim=128)
    assert flops / 1e9 == pytest.approx(gflops, abs=0.06)


def brute_force(mechanism: ClearAttention, grid: TokenGrid) -> Tensor:
    """Cell by cell, by the definition."""
    positions = [(t, y, x) for t in range(grid.frames) for y in range(grid.height) for x in range(grid.width)]
    mask = torch.ones(grid.tokens, grid.tokens, dtype=torch.bool)
    for i, (t, y, x) in enumerate(positions):
        for j, (u, w, z) in enumerate(positions):
            flat = (y - w) ** 2 + (x - z) ** 2
            if mechanism.radius_t is None:
                seen = flat + (t - u) ** 2 < mechanism.radius**2
            else:
                seen = flat < mechanism.radius**2 and abs(t - u) < mechanism.radius_t
            mask[grid.before + i, grid.before + j] = seen
    return mask


@pytest.mark.parametrize(
    "grid", [TokenGrid(5, 8, before=2), TokenGrid(4, 3, frames=3, after=2), TokenGrid(1, 1)], ids=str
)
@pytest.mark.parametrize("options", [{"radius": 2}, {"radius": 2.5}, {"radius": 3, "radius_t": 1}, {"radius": 50}])
def test_mask_by_the_definition(options: dict[str, float], grid: TokenGrid) -> None:
    mechanism = ClearAttention(**options)  # type: ignore[arg-type]
    assert torch.equal(mechanism.mask(grid), brute_force(mechanism, grid))


@pytest.mark.parametrize(
    "grid", [TokenGrid(6, 4, before=3, after=1), TokenGrid(4, 8, frames=3), TokenGrid(2, 2)], ids=str
)
@pytest.mark.parametrize("backend", ["auto", "dense", "tiled"])
def test_pooled_keys(grid: TokenGrid, backend: str) -> None:
    mechanism = ClearAttention(radius=2, down_factor=2)
    weights = mechanism.weights(heads=2, head_dim=8)
    assert isinstance(weights, PooledKeys)
    torch.nn.init.normal_(weights.spatial_weight)
    weights.double()
    q, k, v = torch.randn(3, 2, 2, grid.tokens, 8, dtype=torch.float64, requires_grad=True)
    context = Context(weights=weights)
    out = mechanism.attend(q, k, v, grid, backend=backend, context=context)

    pooled: list[list[Tensor]] = [[], []]
    for tokens, found in zip((k, v), pooled, strict=True):
        cells = tokens[:, :, grid.cell_slice].unflatten(2, grid.shape)
        for frame in range(grid.frames):
            for row in range(0, grid.height, 2):
                for column in range(0, grid.width, 2):
                    block = cells[:, :, frame, row : row + 2, column : column + 2]
                    found.append((block * weights.spatial_weight.view(2, 2, 1)).sum(dim=(2, 3)))
    mask = torch.ones(grid.tokens, grid.tokens + len(pooled[0]), dtype=torch.bool)
    mask[:, : grid.tokens] = brute_force(mechanism, grid)
    for other in [*range(grid.before), *range(grid.before + grid.cells, grid.tokens)]:
        mask[other, grid.tokens :] = False
    assert torch.equal(mechanism.mask(grid), mask)
    assert mechanism.flops(grid, 1, 1) == 4 * int(mask.sum())
    keys, values = (torch.cat([t, torch.stack(found, dim=2)], dim=2) for t, found in zip((k, v), pooled, strict=True))
    want = softmax_reference(q, keys, values, mask=mask)
    assert_close(out, want)

    leaves = (q, k, v, weights.spatial_weight)
    weight = torch.randn_like(out)
    for got, wanted in zip(
        torch.autograd.grad((out * weight).sum(), leaves),
        torch.autograd.grad((want * weight).sum(), leaves),
        strict=True,
    ):
        assert_close(got, wanted)


def test_pooling_starts_as_the_mean() -> None:
    weights = ClearAttention(radius=2, down_factor=4).weights(1, 1)
    assert isinstance(weights, PooledKeys)
    assert weights.spatial_weight.shape == (1, 1, 1, 4, 1, 4, 1)
    assert torch.equal(weights.spatial_weight, torch.full_like(weights.spatial_weight, 1 / 16))


@pytest.mark.parametrize(
    ("options", "tokens", "train_tokens"),
    [
        ({"train_tokens": 300}, 35 + 7, 300),
        ({"official": True, "train_tokens": 300}, 35 + 7, 4608),
        ({"official": True, "down_factor": 5}, 10 * (35 + 7), 4608),
        ({"down_factor": 5, "train_tokens": 300}, 35 + 7, 300),
    ],
)
def test_proportional_scale(options: dict[str, int], tokens: int, train_tokens: int) -> None:
    grid = TokenGrid(5, 5, before=7, after=10) if "down_factor" in options else TokenGrid(5, 7, before=7)
    mechanism = ClearAttention(radius=2, proportional=True, **options)  # type: ignore[arg-type]
    q = torch.zeros(1, 1, grid.tokens, 16)
    factor = math.sqrt(math.log(tokens) / math.log(train_tokens))
    assert mechanism.scale(q, grid, None) == pytest.approx(0.25 * factor)
    assert mechanism.scale(q, grid, 0.5) == pytest.approx(0.5 * factor)
    assert ClearAttention(radius=2).scale(q, grid, None) == 0.25


def test_a_grid_that_the_factor_does_not_divide() -> None:
    with pytest.raises(ValueError, match="down_factor=4 does not divide the grid of 8 rows and 6 columns"):
        ClearAttention(radius=2, down_factor=4).check(TokenGrid(8, 6))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"radius": 0}, "radius must be a positive number, got 0"),
        ({"radius": float("nan")}, "radius must be a positive number, got nan"),
        ({"radius": "16"}, "radius must be a positive number, got '16'"),
        ({"radius": 2, "radius_t": -1}, "radius_t must be a positive number, got -1"),
        ({"radius": 2, "ntk_factor": 0}, "ntk_factor must be a positive number"),
        ({"radius": 2, "down_factor": 2.0}, "down_factor must be None or an int of at least 2"),
        ({"radius": 2, "train_tokens": 1}, "train_tokens must be at least 2"),
    ],
)
def test_bad_options(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ClearAttention(**options)  # type: ignore[arg-type]


def test_the_pattern_says_that_only_offsets_count() -> None:
    """What makes the block mask of an 8K image a matter of a second."""
    assert shift_invariant(ClearAttention(radius=8).pattern(TokenGrid(2, 2)))
