"""What every registered mechanism owes: fast form = reference, forward and gradients, on any grid; sane configs.

A mechanism joins by registering. It needs an entry in `EXAMPLES`; a registered one without fails.
"""

import json
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tolerances import TOLERANCE, assert_close
from torch import Tensor

from diffattn import TokenGrid, config
from diffattn.mechanisms.base import Context, Mechanism

EXAMPLES: dict[str, list[dict[str, Any]]] = {
    "sla": [
        {"top_share": 0.4, "tile": 4, "query_tile": 6},
        {"top_share": 0.3, "tile": 5, "query_tile": 3, "over": "rest", "feature_map": "elu"},
        {},
    ],
    "softmax": [{}, {"proportional": True, "train_tokens": 64}, {"ntk_factor": 10}],
    "clear": [
        {"radius": 1},
        {"radius": 3},
        {"radius": 100},
        {"radius": 2.5, "radius_t": 2},
        {"radius": 2, "proportional": True, "train_tokens": 64},
        {"radius": 1, "pool": 2},
        {"radius": 2, "radius_t": 1, "pool": (1, 3, 2), "proportional": True, "train_tokens": 64},
        {"radius": 100, "pool": 4},
        {"radius": 1, "pool": (1, 2, 3), "means": "learned"},
    ],
    "agent": [{"num_agents": 4}, {"num_agents": 6, "k_scale2": 0.3, "k_shortcut": 0.075}],
    "channel": [{}, {"groups": 4}, {"scale_by": "tokens"}],
    "criss_cross": [
        {},
        {"width": 2},
        {"width": (1, 3)},
        {"width": 100},
        {"width": (4, 2), "pool": (1, 2, 2)},
        {"pool": (2, 1, 3)},
    ],
    "dual_scope": [
        {"padding": 1, "top_k": 2, "local_phase": None, "global_phase": None},
        {"padding": 1, "top_k": 2, "local_phase": (None, 0.5, -1), "global_phase": None, "token_num_scale": True},
        {"padding": 1, "top_k": 3, "local_phase": None, "global_phase": (None, -1, 2), "attn_scale": 0.9},
        {"padding": 1, "top_k": 3, "local_phase": None, "global_phase": (None, -1, 2), "duplicates": True},
        {"padding": 9, "top_k": 0, "local_phase": None, "global_phase": None},
        {"padding": 0, "top_k": 2, "local_phase": None, "global_phase": None, "chosen_by": "content"},
        {"padding": 0, "top_k": 1, "local_phase": None, "global_phase": None, "memory": 2, "forget": 0.2},
        {
            "padding": 0,
            "top_k": 1,
            "local_phase": (None, 0, 1),
            "global_phase": None,
            "memory": 3,
            "chosen_by": "content",
        },
    ],
    "global_context": [
        {"window": 3},
        {"window": (2, 4, 3), "size": (1, 2, 2)},
        {"window": 100, "size": 1},
        {"window": 3, "by": "queries"},
        {"window": (1, 4, 2), "by": "queries", "pool": (1, 2, 2)},
    ],
    "halo": [
        {},
        {"tile": 2},
        {"tile": (2, 3, 2), "halo": (1, 0, 2)},
        {"tile": 3, "radius": 5},
        {"tile": 6, "halo": 0},
        {"tile": 2, "halo": 0, "pool": 1},
        {"tile": (2, 4, 2), "pool": (1, 2, 2), "halo": (0, 1, 0)},
        {"tile": 4, "radius": 3, "pool": 2},
    ],
    "hybrid": [
        {"base": "softmax"},
        {"base": "clear(radius=2)", "feature_map": "learned", "projection": "layer"},
        {"base": "halo(tile=2,halo=0,pool=1)", "feature_map": "elu"},
        {"base": "routing(top_k=2,tile=2,pool=1)"},
    ],
    "linear": [
        {},
        {"feature_map": "relu"},
        {"feature_map": "identity", "normalization": "subtraction"},
        {"feature_map": "learned", "local_residual": (3, 3)},
    ],
    "multi_axis": [
        {},
        {"window": 2},
        {"window": (2, 3, 4), "by": "layers"},
        {"window": 2, "pool": 2},
        {"window": (1, 4, 3), "pool": (2, 3, 2)},
    ],
    "neighborhood": [
        {"kernel_size": 3},
        {"kernel_size": 4, "dilation": 2},
        {"kernel_size": (2, 5, 3), "dilation": (1, 2, 3), "is_causal": (True, False, True)},
        {"kernel_size": 100, "is_causal": (True, True, False)},
        {"kernel_size": 100},
        {"kernel_size": 3, "pool": 2},
        {"kernel_size": (1, 2, 3), "dilation": (1, 2, 2), "pool": (1, 3, 2)},
    ],
    "per_head": [
        {"mechanisms": "clear(radius=2),clear(radius=4)"},
        {"mechanisms": "neighborhood(kernel_size=3),softmax,linear", "heads": (2, 0, 1, 0)},
        {"mechanisms": "halo(tile=2,halo=1,pool=1),multi_axis(window=2)", "heads": (0, 0, 1)},
    ],
    "routing": [
        {"share": 1},
        {"top_k": 2, "tile": 2, "pool": 1},
        {"top_k": 3, "tile": (2, 4, 2), "pool": (1, 2, 2), "query_tile": (1, 3, 5)},
        {"top_k": 2, "tile": 2, "pool": 2, "order": "content"},
        {"top_k": 2, "tile": 2, "pool": 2, "order": "centroids"},
        {"top_k": 1, "tile": 4, "pool": 2},
        {"top_k": 1, "tile": 4, "pool": 2, "means": "weighted"},
        {"top_k": 1, "tile": 4, "pool": 2, "means": "learned"},
    ],
    "shifted_window": [
        {},
        {"window": 2},
        {"window": (2, 3, 4)},
        {"window": 4, "pool": 2},
        {"window": (1, 3, 2), "pool": (2, 2, 3)},
    ],
    "token_merge": [
        {},
        {"ratio": 0.75, "stride": (2, 2, 2), "proportional": True},
        {"ratio": 0.3, "stride": (3, 2), "use_rand": False},
    ],
    "vsa": [
        {"top_share": 0.3, "tile": 2},
        {"top_share": 0.5, "tile": (2, 3, 2)},
        {"top_share": 1},
    ],
    "window_state": [{"radius": 2}, {"radius": 2, "scan": "grid", "pool": 2}],
}

SCALE_CANCELS = {"linear(feature_map=relu)"}
"""max(x, 0) passes a factor on, and the quotient drops it."""

LOOKS_AT_VALUES = {"hybrid", "routing"}
"""Linear in the values as long as they choose the same."""

TELLS_HEADS = {"multi_axis", "per_head", "shifted_window"}
"""Heads have another function by their number."""

GRIDS = [
    TokenGrid(6, 9),
    TokenGrid(11, 7, before=5),
    TokenGrid(5, 3, after=4),
    TokenGrid(4, 6, before=3, after=2),
    TokenGrid(3, 5, frames=4, before=2),
    TokenGrid(1, 1),
    TokenGrid(1, 1, before=3),
    TokenGrid(1, 13),
    TokenGrid(17, 1, after=1),
]


def examples() -> list[Any]:
    return [
        pytest.param(config.create(name, **options), id=f"{name}-{i}")
        for name, many in EXAMPLES.items()
        for i, options in enumerate(many)
    ]


def inputs(grid: TokenGrid, dtype: torch.dtype, batch: int = 2, heads: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = torch.randn(3, batch, heads, grid.tokens, 16, dtype=torch.float64).to(dtype)
    return q.requires_grad_(), k.requires_grad_(), v.requires_grad_()


def test_every_registered_mechanism_has_examples() -> None:
    own = [name for name, kind in config.registered().items() if kind.__module__.startswith("diffattn.")]
    assert sorted(own) == sorted(EXAMPLES)  # a script that some other test imported may have registered one, too


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("mechanism", examples())
@pytest.mark.parametrize(("batch", "heads"), [(1, 1), (2, 3)])
def test_fast_form_is_the_reference(mechanism: Mechanism, grid: TokenGrid, batch: int, heads: int) -> None:
    q, k, v = inputs(grid, torch.float64, batch, heads)
    out, reference = mechanism.attend(q, k, v, grid), mechanism.reference(q, k, v, grid)
    assert_close(out, reference)
    weight = torch.randn_like(out)
    got = torch.autograd.grad((out * weight).sum(), (q, k, v), allow_unused=True)
    want = torch.autograd.grad((reference * weight).sum(), (q, k, v), allow_unused=True)
    for name, left, right in zip("qkv", got, want, strict=True):
        zero = torch.zeros_like(q)
        assert_close(zero if left is None else left, zero if right is None else right, f"gradient of {name}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("grid", GRIDS[1:5], ids=str)
@pytest.mark.parametrize("mechanism", examples())
def test_lower_precision(mechanism: Mechanism, grid: TokenGrid, dtype: torch.dtype) -> None:
    q, k, v = inputs(grid, dtype)
    exact = [tensor.detach().double().requires_grad_() for tensor in (q, k, v)]
    out, reference = mechanism.attend(q, k, v, grid), mechanism.reference(*exact, grid)
    assert out.dtype == dtype
    assert_close(out, reference)
    weight = torch.randn_like(reference)
    got = torch.autograd.grad((out.double() * weight).sum(), (q, k, v), allow_unused=True)
    want = torch.autograd.grad((reference * weight).sum(), exact, allow_unused=True)
    for left, right in zip(got, want, strict=True):
        if right is not None:
            scale = right.abs().max().clamp(min=1)
            assert left is not None and (left - right).abs().max() / scale < 2 * TOLERANCE[dtype]


@pytest.mark.parametrize("additive", [False, True], ids=["bool", "additive"])
@pytest.mark.parametrize("mechanism", examples())
def test_padded_text_is_not_seen(mechanism: Mechanism, additive: bool) -> None:
    grid = TokenGrid(4, 6, before=2, after=5)
    q, k, v = inputs(grid, torch.float64)
    visible = torch.ones(2, 1, 1, grid.tokens, dtype=torch.bool)
    visible[0, ..., -3:] = False
    visible[1, ..., -1:] = False
    mask = torch.zeros(visible.shape, dtype=q.dtype).masked_fill(~visible, -torch.inf) if additive else visible
    out = mechanism.attend(q, k, v, grid, context=Context(mask=mask))
    assert_close(out, mechanism.reference(q, k, v, grid, context=Context(mask=mask)))
    other_k, other_v = (tensor + 10 * torch.randn_like(tensor) * ~visible[:, :, 0, :, None] for tensor in (k, v))
    other = mechanism.attend(q, other_k, other_v, grid, context=Context(mask=mask))
    seeing = visible[:, 0, 0]
    for i in range(2):
        assert_close(other[i][:, seeing[i]], out[i][:, seeing[i]])


@pytest.mark.parametrize("mechanism", examples())
def test_masks_of_single_queries_are_taken_or_refused_as_it_says(mechanism: Mechanism) -> None:
    grid = TokenGrid(8, 10, before=2, after=3)
    q, k, v = (tensor.detach() for tensor in inputs(grid, torch.float64))
    mask = torch.ones(1, 1, grid.tokens, grid.tokens, dtype=torch.bool)
    mask[..., :2, -3:] = mask[..., 20:40, :2] = False
    if mechanism.one_mask:
        with pytest.raises(ValueError, match="mask"):
            mechanism.attend(q, k, v, grid, context=Context(mask=mask))
    else:
        out = mechanism.attend(q, k, v, grid, context=Context(mask=mask))
        assert_close(out, mechanism.reference(q, k, v, grid, context=Context(mask=mask)))


@pytest.mark.parametrize("mechanism", examples())
def test_a_mask_may_have_fewer_axes(mechanism: Mechanism) -> None:
    grid = TokenGrid(8, 10, before=2, after=3)
    q, k, v = (tensor.detach() for tensor in inputs(grid, torch.float64))
    mask = torch.ones(grid.tokens, dtype=torch.bool)
    mask[-2:] = False
    want = mechanism.attend(q, k, v, grid, context=Context(mask=mask[None, None, None]))
    assert_close(mechanism.attend(q, k, v, grid, context=Context(mask=mask)), want)


@pytest.mark.parametrize("mechanism", examples())
def test_scale_multiplies_the_logits(mechanism: Mechanism) -> None:
    grid = TokenGrid(5, 4, before=2)
    q, k, v = inputs(grid, torch.float64)
    assert_close(mechanism.attend(q, k, v, grid, scale=0.4), mechanism.reference(q, k, v, grid, scale=0.4))
    same = torch.allclose(mechanism.attend(q, k, v, grid, scale=0.4), mechanism.attend(q, k, v, grid))
    assert same == (str(mechanism) in SCALE_CANCELS)


@pytest.mark.parametrize("mechanism", examples())
def test_nothing_is_read_before_it_is_written(mechanism: Mechanism, poisoned_memory: None) -> None:
    q, k, v = inputs(TokenGrid(5, 7, before=3), torch.float32)
    out = mechanism.attend(q, k, v, TokenGrid(5, 7, before=3))
    assert out.isfinite().all()
    out.sum().backward()
    assert all(t.grad is not None and t.grad.isfinite().all() for t in (q, k, v) if t.grad is not None)


@pytest.mark.parametrize("mechanism", examples())
@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 3), st.integers(0, 3), st.integers(0, 3))
def test_attention_is_linear_in_the_values_and_equivariant(
    mechanism: Mechanism, height: int, width: int, frames: int, before: int, after: int
) -> None:
    grid = TokenGrid(height, width, frames, before, after)
    generator = torch.Generator().manual_seed(height * 100 + width)
    q, k, v, w = torch.randn(4, 2, 2, grid.tokens, 4, dtype=torch.float64, generator=generator)

    def attend(*tensors: Tensor) -> Tensor:
        return mechanism.attend(*tensors, grid)

    if mechanism.type not in LOOKS_AT_VALUES:
        assert_close(attend(q, k, v + 2 * w), attend(q, k, v) + 2 * attend(q, k, w))
    assert_close(attend(q.flip(0), k.flip(0), v.flip(0)), attend(q, k, v).flip(0))
    if mechanism.type not in TELLS_HEADS:
        assert_close(attend(q.flip(1), k.flip(1), v.flip(1)), attend(q, k, v).flip(1))


@pytest.mark.parametrize("mechanism", examples())
def test_config_goes_through_json(mechanism: Mechanism) -> None:
    assert config.from_dict(json.loads(json.dumps(mechanism.to_dict()))) == mechanism
    assert config.from_text(str(mechanism)) == mechanism, "as tables and errors print it"
    assert hash(mechanism) == hash(config.from_json(config.to_json(mechanism)))


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("mechanism", examples())
def test_mask_and_flops_agree(mechanism: Mechanism, grid: TokenGrid) -> None:
    flops = mechanism.flops(grid, 3, 16)
    assert isinstance(flops, int) and flops > 0
    try:
        mask = mechanism.mask(grid)
    except NotImplementedError:
        return
    means = mask.shape[1] - grid.tokens
    assert mask.shape[0] == grid.tokens and mask.dtype == torch.bool
    assert means == 0 or getattr(mechanism, "pool", None) is not None or getattr(mechanism, "by", None) == "keys"
    assert flops == 4 * (int(mask[:, : grid.tokens].sum()) + grid.cells * means) * 3 * 16


@pytest.mark.parametrize("mechanism", examples())
def test_unknown_backend_is_refused(mechanism: Mechanism) -> None:
    grid = TokenGrid(3, 4)
    with pytest.raises(ValueError, match="warp"):
        mechanism.attend(*inputs(grid, torch.float32), grid, backend="warp")
    with pytest.raises(ValueError, match="warp"):
        mechanism.check_backend("warp")


@pytest.mark.parametrize("mechanism", examples())
def test_tokens_that_do_not_fit_the_grid(mechanism: Mechanism) -> None:
    with pytest.raises(ValueError, match="tokens"):
        mechanism.attend(*inputs(TokenGrid(3, 4), torch.float32), TokenGrid(3, 5))
