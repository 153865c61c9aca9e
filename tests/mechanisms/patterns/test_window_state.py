"""A window with states: against its reference and a definition by hand, and its trained weights."""

import copy
import math
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from tolerances import TOLERANCE, assert_close
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import diffattn
from diffattn import ClearAttention, TokenGrid, WindowStateAttention, config
from diffattn.mechanisms.base import Context
from diffattn.mechanisms.parts import line_states
from diffattn.mechanisms.parts.line_states import StateWeights, cosines
from diffattn.mechanisms.sequences import attend_sequence, reference_sequence
from diffattn.swap.context_parallel import check_mechanism

CONFIGS = {
    "lines": WindowStateAttention(radius=2),
    "frames, pool": WindowStateAttention(radius=2, axes=("rows", "columns", "frames"), features=5, pool=2),
    "grid": WindowStateAttention(radius=1, scan="grid", radius_t=2),
    "columns of the grid": WindowStateAttention(radius=3, axes=("columns",), scan="grid", features=3),
}
GRIDS = [
    TokenGrid(5, 7),
    TokenGrid(4, 6, before=3),
    TokenGrid(3, 5, frames=3, after=2),
    TokenGrid(1, 1, frames=6, before=1, after=4),
    TokenGrid(1, 1),
    TokenGrid(2, 100, before=2),
    TokenGrid(66, 2),
]


def inputs(grid: TokenGrid, dtype: torch.dtype = torch.float64, batch: int = 2) -> list[Tensor]:
    shape = (batch, 3, grid.tokens, 8)
    return [torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_() for _ in range(3)]


def weights_of(mechanism: WindowStateAttention, dtype: torch.dtype = torch.float64) -> StateWeights:
    """Weights with every parameter away from its start."""
    weights = mechanism.weights(3, 8)
    with torch.no_grad():
        for parameter in weights.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
    return weights.to(dtype)


def check_against_reference(
    mechanism: WindowStateAttention, grid: TokenGrid, dtype: torch.dtype = torch.float64, mask: Tensor | None = None
) -> None:
    """Output and gradients of the inputs and of all weights."""
    fast = inputs(grid, dtype)
    slow = [tensor.detach().double().requires_grad_() for tensor in fast]
    weights = weights_of(mechanism, dtype)
    slow_weights = copy.deepcopy(weights).double()
    got = mechanism.attend(*fast, grid, context=Context(mask=mask, weights=weights))
    want = mechanism.reference(*slow, grid, context=Context(mask=mask, weights=slow_weights))
    assert got.dtype == dtype
    assert_close(got, want)
    cotangent = torch.randn(got.shape, dtype=dtype)
    got.backward(cotangent)
    want.backward(cotangent.double())
    for one, other in zip([*fast, *weights.parameters()], [*slow, *slow_weights.parameters()], strict=True):
        assert one.grad is not None and other.grad is not None
        size = other.grad.abs().max().clamp(min=1)
        assert (one.grad - other.grad).abs().max() / size < 2 * TOLERANCE[dtype]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_equals_the_reference(name: str, grid: TokenGrid) -> None:
    check_against_reference(CONFIGS[name], grid)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_equals_the_reference_in_lower_precision(name: str, dtype: torch.dtype) -> None:
    check_against_reference(CONFIGS[name], TokenGrid(5, 7, before=2, after=1), dtype)


def key_masks(grid: TokenGrid) -> dict[str, Tensor]:
    visible = torch.rand(2, 1, 1, grid.tokens) > 0.3
    return {
        "bool": visible,
        "additive": torch.zeros(visible.shape, dtype=torch.float64).masked_fill(~visible, -torch.inf),
        "finite, one per head": torch.randn(2, 3, 1, grid.tokens, dtype=torch.float64),
        "alike in the batch": visible[:1],
        "alike for all keys": torch.ones(1, 1, 1, 1, dtype=torch.bool),
    }


@pytest.mark.parametrize("kind", key_masks(TokenGrid(1, 1)))
@pytest.mark.parametrize("name", ["lines", "grid"])
def test_equals_the_reference_under_a_mask(name: str, kind: str) -> None:
    grid = TokenGrid(5, 4, frames=2, before=6)
    check_against_reference(CONFIGS[name], grid, mask=key_masks(grid)[kind])


@pytest.mark.parametrize("scan", ["lines", "grid"])
def test_pieces_of_lines_and_short_chunks_change_nothing(scan: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mechanism, grid = WindowStateAttention(radius=2, scan=scan), TokenGrid(5, 6, frames=2)
    q, k, v = inputs(grid)
    context = Context(weights=weights_of(mechanism))
    want = mechanism.attend(q, k, v, grid, context=context)
    for uncut, chunk, largest in ((4, 4, 2**24), (5, 3, 1), (64, 32, 3000)):
        for name, value in (("UNCUT", uncut), ("CHUNK", chunk), ("LARGEST", largest)):
            monkeypatch.setattr(line_states, name, value)
        assert_close(mechanism.attend(q, k, v, grid, context=context), want)


# What the mechanism is


@pytest.mark.parametrize("scan", ["lines", "grid"])
def test_the_state_by_hand(scan: str) -> None:
    """Every pair by itself, with the product of the gates between the two cells."""
    grid = TokenGrid(3, 4, frames=2, before=2, after=1)
    mechanism = WindowStateAttention(radius=2, axes=("columns", "frames", "rows"), scan=scan, features=3)
    weights, (q, k, v) = weights_of(mechanism), inputs(grid)
    cells = slice(2, 26)
    places = [(f, y, x) for f in range(2) for y in range(3) for x in range(4)]
    running = {"rows": (0, 1, 2), "columns": (0, 2, 1), "frames": (1, 2, 0)}  # the last changes from cell to cell
    want = ClearAttention(radius=2).reference(q, k, v, grid).detach().clone()
    root = 8**-0.25
    f = (root * q[:, :, cells] @ weights.q_map).softmax(-1).detach()
    g = (root * k[:, :, cells] @ weights.k_map).softmax(-1).detach()
    for number, name in enumerate(mechanism.axes):
        u, e = weights.gate_weight[number].detach(), weights.gate_bias[number].detach()
        gates = torch.sigmoid(torch.einsum("bhnd,ehd->ebhn", root * k[:, :, cells], u) + e[:, None, :, None]).detach()
        order = sorted(range(24), key=lambda i: [places[i][axis] for axis in running[name]])
        for i, query in enumerate(order):
            sums, total = torch.zeros(2, 3, 8, dtype=torch.float64), torch.zeros(2, 3, dtype=torch.float64)
            for j, key in enumerate(order):
                same = all(places[query][axis] == places[key][axis] for axis in running[name][:2])
                if scan == "lines" and not same:
                    continue
                weight = (f[:, :, query] * g[:, :, key]).sum(-1)
                between = order[j + 1 : i + 1] if j <= i else order[i:j]
                for cell in between:
                    weight = weight * gates[0 if j <= i else 1, :, :, cell]
                sums += weight[..., None] * v[:, :, cells][:, :, key].detach()
                total += weight
            want[:, :, 2 + query] += weights.mix[number].detach() * sums / total[..., None]
    assert_close(mechanism.attend(q, k, v, grid, context=Context(weights=weights)), want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("pool", [None, 2])
def test_before_training_it_is_the_window_and_the_mix_learns_first(pool: int | None, dtype: torch.dtype) -> None:
    grid = TokenGrid(6, 7, before=3)
    mechanism = WindowStateAttention(radius=2, pool=pool)
    q, k, v = inputs(grid, dtype)
    weights = mechanism.weights(3, 8)
    window = ClearAttention(radius=2, pool=pool).attend(q, k, v, grid)
    out = mechanism.attend(q, k, v, grid, context=Context(weights=weights))
    assert torch.equal(out, window) and torch.equal(mechanism.attend(q, k, v, grid), window)
    out.float().square().sum().backward()
    assert weights.mix.grad is not None and (weights.mix.grad != 0).all()
    assert all(own.grad is None or not own.grad.any() for name, own in weights.named_parameters() if name != "mix")


@pytest.mark.parametrize(("scan", "reached"), [("lines", {(4, 3), (9, 3), (4, 8)}), ("grid", None)])
def test_the_state_reaches_beyond_the_window(scan: str, reached: set[tuple[int, int]] | None) -> None:
    """The cells that read a far one: those of its row and its column, or all."""
    grid = TokenGrid(10, 9)
    mechanism = WindowStateAttention(radius=1, scan=scan)
    q, k, v = (tensor.detach() for tensor in inputs(grid))
    context = Context(weights=weights_of(mechanism))
    before = mechanism.attend(q, k, v, grid, context=context)
    v[:, :, 4 * 9 + 3] += 1
    changed = (mechanism.attend(q, k, v, grid, context=context) != before).any(dim=(0, 1, 3)).reshape(10, 9)
    assert changed[4].all() and changed[:, 3].all()
    assert changed.sum() == (18 if reached is not None else 90)
    assert reached is None or all(changed[place] for place in reached)


def test_text_is_in_the_softmax_alone() -> None:
    grid = TokenGrid(5, 6, before=4)
    mechanism = CONFIGS["lines"]
    q, k, v = (tensor.detach() for tensor in inputs(grid))
    context = Context(weights=weights_of(mechanism))
    alone = mechanism.attend(q, k, v, grid, context=context) - mechanism.attend(q, k, v, grid)
    assert not alone[:, :, :4].any() and alone[:, :, 4:].abs().min() > 0
    k[:, :, :4], v[:, :, :4] = 7, -7
    assert_close(mechanism.attend(q, k, v, grid, context=context) - mechanism.attend(q, k, v, grid), alone)


@pytest.mark.parametrize("scan", ["lines", "grid"])
def test_a_state_is_a_mean(scan: str) -> None:
    """Equal values are read as they are, so each cell counts once along each axis."""
    grid = TokenGrid(5, 6, frames=2, before=1)
    mechanism = WindowStateAttention(radius=2, axes=("rows", "columns", "frames"), scan=scan)
    q, k, v = inputs(grid)
    v = v[:, :, :1].expand_as(v)
    weights = weights_of(mechanism)
    out = mechanism.attend(q, k, v, grid, context=Context(weights=weights))[:, :, 1:]
    assert_close(out, v[:, :, 1:] * (1 + weights.mix.sum(0)[:, None]))


def test_closed_gates_keep_a_cell_by_itself_and_open_ones_a_whole_line() -> None:
    grid, mechanism = TokenGrid(2, 130), WindowStateAttention(radius=1, axes=("rows",))
    q, k, v = inputs(grid, torch.float32)
    weights = mechanism.weights(3, 8)
    with torch.no_grad():
        weights.mix.fill_(1)
        weights.gate_bias.fill_(-300)
    alone = mechanism.attend(q, k, v, grid, context=Context(weights=weights))
    assert_close(alone, 2 * v)
    alone.sum().backward()
    assert all(tensor.grad is not None and tensor.grad.isfinite().all() for tensor in (q, k, v, *weights.parameters()))
    with torch.no_grad():
        weights.gate_bias.fill_(300)
        weights.q_map.zero_()
        weights.k_map.zero_()
    mean = v.unflatten(2, (2, 130)).mean(3, keepdim=True).expand(-1, -1, -1, 130, -1).flatten(2, 3)
    assert_close(mechanism.attend(q, k, v, grid, context=Context(weights=weights)), v + mean)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_large_inputs_stay_finite(dtype: torch.dtype) -> None:
    grid, mechanism = TokenGrid(3, 100), WindowStateAttention(radius=2, scan="grid")
    q, k, v = (1000 * tensor.detach() for tensor in inputs(grid, dtype))
    k.requires_grad_()
    out = mechanism.attend(q, k, v, grid, context=Context(weights=weights_of(mechanism, torch.float32)))
    out.float().sum().backward()
    assert out.isfinite().all() and k.grad is not None and k.grad.isfinite().all()


@pytest.mark.parametrize("name", ["lines", "grid"])
def test_hidden_cells_are_as_if_they_were_not_there(name: str) -> None:
    mechanism, grid = CONFIGS[name], TokenGrid(1, 9, before=2)
    q, k, v = inputs(grid)
    visible = torch.tensor([1, 1, 1, 0, 1, 1, 0, 0, 1, 0, 1], dtype=torch.bool)
    weights = weights_of(mechanism)
    states = mechanism.attend(q, k, v, grid, context=Context(mask=visible, weights=weights)) - mechanism.attend(
        q, k, v, grid, context=Context(mask=visible)
    )
    kept = [tensor[:, :, visible] for tensor in (q, k, v)]
    fewer = TokenGrid(1, 5, before=2)
    want = mechanism.attend(*kept, fewer, context=Context(weights=weights)) - mechanism.attend(*kept, fewer)
    # the columns of the two grids have one cell each
    assert_close(states[:, :, visible], want)


def test_where_all_cells_are_hidden_the_state_is_zero() -> None:
    mechanism, grid = CONFIGS["lines"], TokenGrid(3, 4, before=2)
    mask = torch.arange(grid.tokens) < 2
    q, k, v = inputs(grid)
    context = Context(mask=mask, weights=weights_of(mechanism))
    out = mechanism.attend(q, k, v, grid, context=context)
    assert_close(out, mechanism.attend(q, k, v, grid, context=Context(mask=mask)))
    out.sum().backward()
    assert q.grad is not None and q.grad.isfinite().all()


def test_silent_tokens_and_several_grids() -> None:
    mechanism = CONFIGS["lines"]
    context = Context(weights=weights_of(mechanism))
    silent = TokenGrid(4, 5, before=3, after=2, silent=(3, 1))
    q, k, v = inputs(silent)
    asking = q[:, :, silent.query_slice]
    assert_close(
        attend_sequence(mechanism, asking, k, v, [silent], context=context),
        reference_sequence(mechanism, asking, k, v, [silent], context=context),
    )
    grids = [TokenGrid(3, 4, before=2, after=10), TokenGrid(2, 5, before=14)]
    q, k, v = inputs(grids[0])
    assert_close(
        attend_sequence(mechanism, q, k, v, grids, context=context),
        reference_sequence(mechanism, q, k, v, grids, context=context),
    )


def test_states_are_summed_in_float32_under_autocast() -> None:
    grid, mechanism = TokenGrid(4, 80), CONFIGS["grid"]
    q, k, v = inputs(grid, torch.bfloat16)
    context = Context(weights=weights_of(mechanism, torch.float32))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = mechanism.attend(q, k, v, grid, context=context)
    assert torch.equal(inside, mechanism.attend(q, k, v, grid, context=context))


# Its weights


def test_maps_start_orthonormal_without_random_numbers() -> None:
    for features in (1, 5, 8):
        basis = cosines(8, features).double()
        torch.testing.assert_close(basis.T @ basis, torch.eye(features, dtype=torch.float64), atol=1e-6, rtol=0)
    state = torch.get_rng_state()
    weights = WindowStateAttention(radius=2, features=100).weights(3, 8)
    assert torch.equal(torch.get_rng_state(), state)
    assert weights.q_map.shape == (3, 8, 8) and weights.gate_weight.shape == (2, 2, 3, 8)


def test_a_swapped_model_begins_as_the_window_and_keeps_its_weights_in_a_file(tmp_path: Path) -> None:
    tiny, other, window = models.flux(), models.flux(), models.flux()
    mechanism = WindowStateAttention(radius=1.5, features=4)
    with torch.no_grad():
        diffattn.apply(window.model, ClearAttention(radius=1.5))
        handle = diffattn.apply(tiny.model, mechanism)
        untrained = tiny.run()
        assert torch.equal(untrained, window.run())
        for parameter in handle.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
        trained = tiny.run()
        assert not torch.equal(trained, untrained)
        diffattn.save(tiny.model, tmp_path)
        loaded = diffattn.load(other.model, tmp_path)
        assert loaded.layers[0].mechanism == mechanism
        assert torch.equal(other.run(), trained)


def test_a_part_of_the_heads_is_refused_under_context_parallelism() -> None:
    mechanism = CONFIGS["lines"]
    with pytest.raises(NotImplementedError, match=r"weights for each head \(q_map\).* 2 of 4 heads"):
        check_mechanism(mechanism, mechanism.weights(4, 8), torch.empty(1, 4, 9, 8), 2)


# Options and costs


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"radius": 0}, "radius must be a positive number"),
        ({"radius": 2, "axes": ()}, "axes must be some of rows, columns, frames, each once"),
        ({"radius": 2, "axes": ("rows", "rows")}, "each once"),
        ({"radius": 2, "axes": ("height",)}, "some of rows, columns, frames"),
        ({"radius": 2, "scan": "zigzag"}, "scan must be one of lines, grid, got 'zigzag'"),
        ({"radius": 2, "features": 0}, "features must be an int from 1 to 4096"),
        ({"radius": 2, "eps": 0}, "eps must be a positive number"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_wrong_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        WindowStateAttention(**options)


def test_wrong_calls() -> None:
    grid, mechanism = TokenGrid(3, 4), CONFIGS["lines"]
    q, k, v = inputs(grid)
    with pytest.raises(ValueError, match=r"mask must be the same for all of them, \(b, 1, 1, keys\), got \(12, 12\)"):
        mechanism.attend(q, k, v, grid, context=Context(mask=torch.ones(12, 12, dtype=torch.bool)))
    with pytest.raises(ValueError, match=r"must come from mechanism\.weights\(heads, head_dim\), got a Linear"):
        mechanism.attend(q, k, v, grid, context=Context(weights=nn.Linear(1, 1)))
    with pytest.raises(ValueError, match="window_state: scale .* at least 0, got -1"):
        mechanism.attend(q, k, v, grid, scale=-1, context=Context(weights=mechanism.weights(3, 8).double()))
    with pytest.raises(NotImplementedError, match="window_state is not a mask"):
        mechanism.mask(grid)


def test_json_round_trip() -> None:
    for mechanism in CONFIGS.values():
        assert config.from_json(config.to_json(mechanism)) == mechanism


@pytest.mark.parametrize("grid", [TokenGrid(5, 7, before=3), TokenGrid(3, 70, frames=2)], ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_operations_are_those_computed(name: str, grid: TokenGrid) -> None:
    """Gates are sums of products, not matrix products, and so is the mix; the window is counted by its pairs."""
    mechanism = CONFIGS[name]
    q, k, v = (tensor.detach() for tensor in inputs(grid, torch.float32, batch=1))
    mechanism.attend(q, k, v, grid)  # what is computed once, of the window's shape
    counts = []
    for weights in (None, mechanism.weights(3, 8)):
        with FlopCounterMode(display=False) as counter:
            mechanism.attend(q, k, v, grid, context=Context(weights=weights))
        counts.append(counter.get_total_flops())
    window = ClearAttention(radius=mechanism.radius, radius_t=mechanism.radius_t, pool=mechanism.pool)
    mixes = len(mechanism.axes) * 2 * grid.cells * 8 * 3
    assert mechanism.flops(grid, 3, 8) - window.flops(grid, 3, 8) - mixes == counts[1] - counts[0]


def test_cost_grows_with_the_cells_and_the_length_of_a_short_line() -> None:
    def states(grid: TokenGrid, **options: Any) -> int:
        window = ClearAttention(radius=2).flops(grid, 8, 64)
        return WindowStateAttention(radius=2, **options).flops(grid, 8, 64) - window

    assert states(TokenGrid(64, 128), axes=("columns",)) == 2 * states(TokenGrid(64, 64), axes=("columns",))
    long, longer = (states(TokenGrid(64, width), scan="grid") for width in (64, 128))
    assert math.isclose(longer, 2 * long, rel_tol=0.01)


@pytest.mark.compile
@pytest.mark.parametrize("name", ["lines", "grid"])
def test_compiles_whole(name: str) -> None:
    mechanism, grid = CONFIGS[name], TokenGrid(6, 12, before=2)
    q, k, v = inputs(grid, torch.float32)
    context = Context(weights=weights_of(mechanism, torch.float32), mask=torch.arange(74)[None, None, None] > 1)
    compiled = torch.compile(
        lambda q, k, v: mechanism.attend(q, k, v, grid, context=context, backend="dense"),
        backend="eager",
        fullgraph=True,
    )
    assert_close(compiled(q, k, v), mechanism.attend(q, k, v, grid, context=context))
