"""Linear attention: against its reference, what its options mean, and its trained weights."""

import copy
import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from tolerances import TOLERANCE, assert_close
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import FlopCounterMode

import diffattn
from diffattn import config
from diffattn.grid import TokenGrid
from diffattn.mechanisms.base import Context
from diffattn.mechanisms.linear import LinearAttention
from diffattn.mechanisms.parts.linear_weights import LinearWeights
from diffattn.mechanisms.softmax import softmax_reference

CONFIGS = {
    "elu": LinearAttention(),
    "relu": LinearAttention(feature_map="relu", local_residual=(3, 3)),
    "subtraction": LinearAttention(feature_map="identity", normalization="subtraction"),
    "subtraction, elu": LinearAttention(normalization="subtraction"),
    "inline": LinearAttention.inline(),
    "learned": LinearAttention(feature_map="learned"),
    "learned, residual": LinearAttention(feature_map="learned", local_residual=(3, 1, 5)),
}
GRIDS = [
    TokenGrid(5, 7),
    TokenGrid(4, 6, before=3),
    TokenGrid(3, 5, frames=3, after=2),
    TokenGrid(1, 1, frames=6, before=1, after=4),
    TokenGrid(1, 1),
]


def inputs(grid: TokenGrid, dtype: torch.dtype = torch.float64, batch: int = 2, heads: int = 3) -> list[Tensor]:
    shape = (batch, heads, grid.tokens, 8)
    return [torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_() for _ in range(3)]


def weights_of(mechanism: LinearAttention, dtype: torch.dtype = torch.float64) -> LinearWeights | None:
    """Weights with every parameter away from its start."""
    weights = mechanism.weights(3, 8)
    if weights is not None:
        with torch.no_grad():
            for parameter in weights.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
        weights.to(dtype)
    return weights


def check_against_reference(
    mechanism: LinearAttention, grid: TokenGrid, dtype: torch.dtype, mask: Tensor | None
) -> None:
    """Output and gradients of the inputs and the weights."""
    fast = inputs(grid, dtype)
    slow = [tensor.detach().double().requires_grad_() for tensor in fast]
    weights = weights_of(mechanism, dtype)
    slow_weights = None if weights is None else copy.deepcopy(weights).double()
    slow_mask = mask.double() if mask is not None and mask.is_floating_point() else mask
    got = mechanism.attend(*fast, grid, context=Context(mask=mask, weights=weights))
    want = mechanism.reference(*slow, grid, context=Context(mask=slow_mask, weights=slow_weights))
    assert got.dtype == dtype
    assert_close(got, want)
    cotangent = torch.randn(got.shape, dtype=dtype)
    got.backward(cotangent)
    want.backward(cotangent.double())
    own = list(weights.parameters()) if weights is not None else []
    slow_own = list(slow_weights.parameters()) if slow_weights is not None else []
    for one, other in zip([*fast, *own], [*slow, *slow_own], strict=True):
        one_grad = torch.zeros_like(one) if one.grad is None else one.grad
        other_grad = torch.zeros_like(other) if other.grad is None else other.grad
        size = other_grad.abs().max().clamp(min=1)
        assert (one_grad - other_grad).abs().max() / size < 2 * TOLERANCE[dtype]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_equals_the_reference(name: str, grid: TokenGrid) -> None:
    check_against_reference(CONFIGS[name], grid, torch.float64, None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_equals_the_reference_in_lower_precision(name: str, dtype: torch.dtype) -> None:
    check_against_reference(CONFIGS[name], TokenGrid(5, 7, before=2, after=1), dtype, None)


def key_masks(grid: TokenGrid) -> dict[str, Tensor]:
    visible = torch.rand(2, 1, 1, grid.tokens) > 0.3
    finite = torch.randn(2, 3, 1, grid.tokens, dtype=torch.float64)
    return {
        "bool": visible,
        "additive": torch.zeros(visible.shape, dtype=torch.float64).masked_fill(~visible, -torch.inf),
        "finite, one per head": finite,
        "finite and hidden": (100 + finite).masked_fill(~visible, -torch.inf),
        "alike in the batch": visible[:1],
        "keys alone": visible[0, 0, 0],
    }


@pytest.mark.parametrize("kind", key_masks(TokenGrid(1, 1)))
@pytest.mark.parametrize("name", CONFIGS)
def test_equals_the_reference_under_a_mask(name: str, kind: str) -> None:
    grid = TokenGrid(5, 4, before=6)
    mask = key_masks(grid)[kind]
    if kind == "keys alone":
        # one axis is what `attend` takes beyond the (b, h, 1, keys) of the models
        mechanism, tensors = CONFIGS[name], inputs(grid)
        got, want = (mechanism.attend(*tensors, grid, context=Context(mask=m)) for m in (mask, mask[None, None, None]))
        assert_close(got, want)
    else:
        check_against_reference(CONFIGS[name], grid, torch.float64, mask)


# What the mechanism is


@pytest.mark.parametrize("name", ["elu", "subtraction", "learned"])
def test_hidden_keys_are_as_if_they_were_not_there(name: str) -> None:
    mechanism, grid = CONFIGS[name], TokenGrid(4, 5, before=3)
    q, k, v = inputs(grid)
    visible = torch.arange(grid.tokens) % 3 > 0
    out = mechanism.attend(q, k, v, grid, context=Context(mask=visible[None, None, None]))
    assert_close(out, mechanism.reference(q, k[:, :, visible], v[:, :, visible], grid))


@pytest.mark.parametrize("name", ["elu", "subtraction", "learned"])
def test_a_bias_of_log_2_counts_a_key_twice(name: str) -> None:
    mechanism, grid = CONFIGS[name], TokenGrid(4, 5)
    q, k, v = inputs(grid)
    mask = torch.zeros(1, 1, 1, 20, dtype=torch.float64)
    mask[..., 7] = math.log(2)
    twice = [torch.cat([tensor, tensor[:, :, 7:8]], dim=2) for tensor in (k, v)]
    out = mechanism.attend(q, k, v, grid, context=Context(mask=mask))
    assert_close(out, mechanism.reference(q, *twice, grid))


@pytest.mark.parametrize("name", CONFIGS)
def test_weights_sum_to_one(name: str) -> None:
    grid = TokenGrid(4, 6, before=2)
    q, k, v = inputs(grid)
    alike = torch.ones_like(v) * torch.arange(8)
    assert_close(CONFIGS[name].attend(q, k, alike, grid), alike)


def test_the_identity_with_subtraction_is_the_softmax_to_first_order() -> None:
    mechanism, grid = CONFIGS["subtraction"], TokenGrid(6, 7, before=2)
    q, k, v = (tensor.detach() for tensor in inputs(grid))
    mask = torch.randn(2, 1, 1, grid.tokens, dtype=torch.float64)
    errors = [
        float((mechanism.attend(q, k, v, grid, scale=s, context=Context(mask=mask))
               - softmax_reference(q, k, v, scale=s, mask=mask)).abs().max())
        for s in (1e-2, 1e-3)
    ]  # fmt: skip
    assert errors[1] < 1e-4
    assert 80 < errors[0] / errors[1] < 120


def test_division_mixes_up_queries_that_subtraction_tells_apart() -> None:
    grid = TokenGrid(3, 4)
    q, k, v = inputs(grid)
    for mechanism, apart in (
        (LinearAttention(feature_map="relu"), False),
        (LinearAttention(feature_map="relu", normalization="subtraction"), True),
        (CONFIGS["subtraction"], True),
    ):
        difference = mechanism.attend(3 * q, k, v, grid) - mechanism.attend(q, k, v, grid)
        assert (difference.abs().max() > 0.1) == apart


def test_features_that_meet_no_key_give_zero() -> None:
    grid, mechanism = TokenGrid(2, 3), LinearAttention(feature_map="relu")
    q, k, v = inputs(grid, torch.float32)
    with torch.no_grad():
        q[:, :, 2] = -1
        k[..., :4] = -1
        q[:, :, 3, 4:] = -1
    out = mechanism.attend(q, k, v, grid)
    assert not out[:, :, 2:4].any() and out[:, :, 4:].any()
    out.sum().backward()
    assert all(tensor.grad is not None and tensor.grad.isfinite().all() for tensor in (q, k, v))


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("additive", [False, True])
def test_a_sample_that_sees_nothing_gives_zero(name: str, additive: bool) -> None:
    grid, mechanism = TokenGrid(3, 4, before=1), CONFIGS[name]
    q, k, v = inputs(grid, torch.float32)
    mask = torch.ones(2, 1, 1, grid.tokens, dtype=torch.bool)
    mask[1] = False
    if additive:
        mask = torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)
    out = mechanism.attend(q, k, v, grid, context=Context(mask=mask))
    assert out[0].all() and not out[1].any()
    out.sum().backward()
    assert all(tensor.grad is not None and tensor.grad.isfinite().all() for tensor in (q, k, v))


def test_no_step_is_as_large_as_queries_times_keys() -> None:
    class Largest(TorchDispatchMode):
        numbers = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            sizes = [tensor.numel() for tensor in tree_iter(out) if isinstance(tensor, Tensor)]
            self.numbers = max([self.numbers, *sizes])
            return out

    grid = TokenGrid(30, 40, before=10)
    tensors = inputs(grid, torch.float32, batch=1)
    for name, mechanism in CONFIGS.items():
        with Largest() as largest:
            mechanism.attend(
                *tensors, grid, context=Context(weights=weights_of(mechanism, torch.float32))
            ).sum().backward()
        # features are twice as wide as a head, padding adds frames, rows and columns
        assert largest.numbers <= 4 * tensors[0].numel(), name


# Precision


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["elu", "relu", "subtraction", "learned"])
def test_sums_over_many_keys_keep_their_precision(name: str, dtype: torch.dtype) -> None:
    """In float16 the sums would overflow, in bfloat16 they would stop growing."""
    grid, mechanism = TokenGrid(64, 64), CONFIGS[name]
    q, k, v = torch.randn(3, 1, 1, grid.tokens, 8).to(dtype)
    k = k + 30 if name in ("elu", "relu") else k
    got = mechanism.attend(q, k, v + 5, grid)
    want = mechanism.reference(q.double(), k.double(), (v + 5).double(), grid)
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), want, atol=0, rtol=torch.finfo(dtype).eps)


def test_autocast_does_not_coarsen_the_sums() -> None:
    grid, mechanism = TokenGrid(6, 7), CONFIGS["elu"]
    q, k, v = inputs(grid, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        got = mechanism.attend(q, k, v, grid)
    assert torch.equal(got, mechanism.attend(q, k, v, grid))


def test_learned_features_do_not_overflow() -> None:
    grid, mechanism = TokenGrid(4, 5), CONFIGS["learned"]
    q, k, v = inputs(grid, torch.float32)
    out = mechanism.attend(q * 300, k * 300, v, grid)
    assert out.isfinite().all() and out.abs().max() > 0.1
    out.sum().backward()
    assert all(tensor.grad is not None and tensor.grad.isfinite().all() for tensor in (q, k, v))


# Trained weights


def test_weights_start_where_no_weights_are() -> None:
    grid = TokenGrid(4, 6, before=2)
    for name, mechanism in CONFIGS.items():
        q, k, v = inputs(grid)
        fresh = mechanism.attend(q, k, v, grid, context=Context(weights=mechanism.weights(3, 8)))
        assert torch.equal(fresh, mechanism.attend(q, k, v, grid)), name
        assert (mechanism.weights(3, 8) is None) == (name in ("elu", "subtraction", "subtraction, elu"))
    plain = replace(CONFIGS["inline"], local_residual=())
    q, k, v = inputs(grid)
    assert torch.equal(CONFIGS["inline"].attend(q, k, v, grid), plain.attend(q, k, v, grid))


def test_fresh_weights_can_learn() -> None:
    grid, mechanism = TokenGrid(4, 6), LinearAttention(feature_map="learned", local_residual=(3, 3))
    weights = mechanism.weights(3, 8)
    assert weights is not None
    mechanism.attend(*inputs(grid), grid, context=Context(weights=weights)).square().sum().backward()
    moved = {
        name for name, parameter in weights.named_parameters() if parameter.grad is not None and parameter.grad.any()
    }
    assert moved == {"q_map", "k_map", "kernel_weight", "kernel_bias"}


@pytest.mark.parametrize("box", [(3,), (5, 3), (3, 1, 3)])
def test_the_residual_by_hand(box: tuple[int, ...]) -> None:
    grid = TokenGrid(3, 4, frames=2, before=1, after=2)
    weights = weights_of(LinearAttention(local_residual=box))
    assert weights is not None
    v = torch.randn(1, 3, grid.tokens, 8, dtype=torch.float64)
    got = weights.local(v, grid)
    cells = v[0, :, 1:-2].view(3, 2, 3, 4, 8)
    frames, rows, columns = (1, 1, *box)[-3:]
    hidden = nn.functional.gelu(
        torch.stack(
            [cells[h].mean(dim=(0, 1, 2)) @ weights.hidden_weight[h] + weights.hidden_bias[h] for h in range(3)]
        )
    )
    for head, (f, y, x) in itertools.product(range(3), itertools.product(range(2), range(3), range(4))):
        kernel = torch.einsum("e,eco->co", hidden[head], weights.kernel_weight[head]) + weights.kernel_bias[head]
        kernel = kernel.view(8, frames, rows, columns)
        want = torch.zeros(8, dtype=torch.float64)
        for df, dy, dx in itertools.product(range(frames), range(rows), range(columns)):
            place = (f + df - frames // 2, y + dy - rows // 2, x + dx - columns // 2)
            if all(0 <= i < n for i, n in zip(place, grid.shape, strict=True)):
                want = want + kernel[:, df, dy, dx] * cells[(head, *place)]
        assert_close(got[0, head, (f * 3 + y) * 4 + x], want)


def test_the_residual_is_for_cells_and_leaves_out_hidden_ones() -> None:
    grid, mechanism = TokenGrid(4, 5, before=3), CONFIGS["inline"]
    weights = weights_of(mechanism)
    q, k, v = inputs(grid)
    plain = replace(mechanism, local_residual=())
    difference = mechanism.attend(q, k, v, grid, context=Context(weights=weights)) - plain.attend(q, k, v, grid)
    assert not difference[:, :, :3].any() and difference[:, :, 3:].all()
    mask = torch.ones(1, 1, 1, grid.tokens, dtype=torch.bool)
    mask[..., [1, 9, 10]] = False
    context = Context(mask=mask, weights=weights)
    other = [tensor + 5 * ~mask.mT for tensor in (k, v)]
    assert_close(mechanism.attend(q, *other, grid, context=context), mechanism.attend(q, k, v, grid, context=context))


def test_the_residual_averages_what_is_visible() -> None:
    weights = weights_of(LinearAttention(local_residual=(1, 1)))
    assert weights is not None
    v = torch.randn(2, 3, 12, 8, dtype=torch.float64)
    visible = torch.arange(12) % 3 > 0
    got = weights.local(v, TokenGrid(3, 4), visible[None, None, :, None])
    assert_close(got[:, :, visible], weights.local(v[:, :, visible], TokenGrid(1, 8)))


# In models


@pytest.mark.parametrize(
    ("build", "name"),
    [
        (models.flux, "elu"),
        (models.flux, "learned, residual"),
        (models.sd15, "inline"),
        (models.wan, "learned, residual"),
    ],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_in_a_model(build: Callable[[], models.Tiny], name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny, mechanism = build(), CONFIGS[name]
    with torch.no_grad():
        plain = tiny.run()
    handle = diffattn.apply(tiny.model, mechanism)
    with torch.no_grad():
        for parameter in handle.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    swapped = tiny.run()
    assert (swapped - plain).abs().max() > 0.01
    if mechanism.weights(1, 1) is not None:
        swapped.square().sum().backward()
        grads = [parameter.grad for parameter in handle.parameters()]
        assert grads and all(grad is not None and grad.any() for grad in grads)

    def by_reference(self: LinearAttention, q: Tensor, k: Tensor, v: Tensor, grid: TokenGrid, **options: Any) -> Tensor:
        assert options.pop("backend") == "auto"
        exact = copy.deepcopy(options["context"].weights)
        options["context"] = replace(options["context"], weights=exact.double() if exact is not None else None)
        return self.reference(q.double(), k.double(), v.double(), grid, **options).to(q.dtype)

    monkeypatch.setattr(LinearAttention, "attend", by_reference)
    with torch.no_grad():
        torch.testing.assert_close(tiny.run(), swapped.detach(), atol=2e-5, rtol=2e-5)
    handle.restore()
    with torch.no_grad():
        assert torch.equal(tiny.run(), plain)


def test_learned_weights_go_through_an_adapter_file(tmp_path: Path) -> None:
    tiny, other = models.flux(), models.flux()
    mechanism = LinearAttention(feature_map="learned", local_residual=(3, 3))
    handle = diffattn.apply(tiny.model, mechanism)
    with torch.no_grad():
        for parameter in handle.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        trained = tiny.run()
        diffattn.save(tiny.model, tmp_path)
        loaded = diffattn.load(other.model, tmp_path)
        assert loaded.layers[0].mechanism == mechanism
        assert torch.equal(other.run(), trained)


# Configs


@pytest.mark.parametrize("mechanism", CONFIGS.values(), ids=str)
def test_json_round_trip(mechanism: LinearAttention) -> None:
    assert config.from_json(config.to_json(mechanism)) == mechanism


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"feature_map": "exp"}, "feature_map must be one of elu, relu, identity, learned, got 'exp'"),
        ({"normalization": "none"}, "normalization must be one of division, subtraction"),
        ({"feature_map": "identity"}, 'use normalization="subtraction"'),
        ({"feature_map": "learned", "normalization": "subtraction"}, "leave that out"),
        ({"local_residual": 3}, "local_residual must be"),
        ({"local_residual": (2, 3)}, "odd ints"),
        ({"local_residual": (3, 3, 3, 3)}, "local_residual must be"),
        ({"local_residual": (-1, 3)}, "local_residual must be"),
        ({"local_residual": (True, 3)}, "local_residual must be"),
        ({"eps": 0}, "eps must be a positive number, got 0"),
        ({"eps": math.inf}, "eps must be a positive number"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_wrong_options(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LinearAttention(**options)  # type: ignore[arg-type]


def test_wrong_calls() -> None:
    grid = TokenGrid(3, 4)
    q, k, v = inputs(grid)
    mechanism = LinearAttention()
    with pytest.raises(ValueError, match=r"mask must be the same for all of them, \(b, 1, 1, keys\), got \(12, 12\)"):
        mechanism.attend(q, k, v, grid, context=Context(mask=torch.ones(12, 12, dtype=torch.bool)))
    with pytest.raises(ValueError, match="scale .* at least 0, got -1"):
        mechanism.attend(q, k, v, grid, scale=-1)
    with pytest.raises(ValueError, match=r"must come from mechanism\.weights\(heads, head_dim\), got a Linear"):
        mechanism.attend(q, k, v, grid, context=Context(weights=nn.Linear(1, 1)))


@pytest.mark.parametrize(
    "name", [name for name in CONFIGS if "residual" not in name and name not in ("inline", "relu")]
)
def test_flops_are_those_computed(name: str) -> None:
    mechanism, grid = CONFIGS[name], TokenGrid(5, 6, before=3)
    q, k, v = (tensor.detach() for tensor in inputs(grid, torch.float32, batch=1))
    with FlopCounterMode(display=False) as counter:
        mechanism.attend(q, k, v, grid, context=Context(weights=mechanism.weights(3, 8)))
    assert mechanism.flops(grid, 3, 8) == counter.get_total_flops()


def test_flops_of_the_residual_and_at_size() -> None:
    grid = TokenGrid(5, 6, before=3)
    residual = CONFIGS["inline"].flops(grid, 3, 8) - CONFIGS["subtraction"].flops(grid, 3, 8)
    assert residual == 3 * (2 * 9 * 30 * 8 + 2 * 8 * 8 + 2 * 8 * 8 * 9)
    small, large = (LinearAttention().flops(TokenGrid(64, width), 8, 64) for width in (64, 128))
    assert large == 2 * small


@pytest.mark.compile
@pytest.mark.parametrize("name", ["elu", "inline", "learned, residual"])
def test_compiles_whole(name: str) -> None:
    mechanism, grid = CONFIGS[name], TokenGrid(6, 8, before=2)
    q, k, v = inputs(grid, torch.float32)
    context = Context(weights=weights_of(mechanism, torch.float32), mask=torch.arange(50)[None, None, None] > 1)
    compiled = torch.compile(
        lambda q, k, v: mechanism.attend(q, k, v, grid, context=context), backend="eager", fullgraph=True
    )
    assert_close(compiled(q, k, v), mechanism.attend(q, k, v, grid, context=context))
