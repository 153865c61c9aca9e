"""Token merging as a mechanism: against its reference, what it may not depend on, and what it refuses."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import models
import pytest
import torch
from tolerances import assert_close
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import diffattn
from diffattn import config
from diffattn.grid import TokenGrid
from diffattn.mechanisms.base import Context
from diffattn.mechanisms.parts import merging
from diffattn.mechanisms.softmax import softmax_reference
from diffattn.mechanisms.token_merge import TokenMergeAttention

CONFIGS = {
    "default": TokenMergeAttention(),
    "most": TokenMergeAttention(ratio=0.75),
    "first cells": TokenMergeAttention(ratio=0.3, stride=(1, 3), use_rand=False),
    "proportional": TokenMergeAttention(ratio=0.4, proportional=True),
    "across frames": TokenMergeAttention(ratio=0.6, stride=(2, 2, 3), seed=4),
}
GRIDS = [
    TokenGrid(5, 7),
    TokenGrid(4, 6, before=3),
    TokenGrid(3, 5, frames=3, after=2),
    TokenGrid(2, 1, frames=2, before=1, after=4),
]


def inputs(grid: TokenGrid, dtype: torch.dtype = torch.float64, batch: int = 2, heads: int = 3) -> list[Tensor]:
    shape = (batch, heads, grid.tokens, 8)
    return [torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_() for _ in range(3)]


def check_against_reference(
    mechanism: TokenMergeAttention, grid: TokenGrid, dtype: torch.dtype, context: Context
) -> None:
    fast = inputs(grid, dtype)
    slow = [tensor.detach().double().requires_grad_() for tensor in fast]
    got, want = mechanism.attend(*fast, grid, context=context), mechanism.reference(*slow, grid, context=context)
    assert got.dtype == dtype
    assert_close(got, want)
    cotangent = torch.randn(got.shape, dtype=dtype)
    got.backward(cotangent)
    want.backward(cotangent.double())
    for name, one, other in zip("qkv", fast, slow, strict=True):
        assert one.grad is not None and other.grad is not None
        assert_close(one.grad, other.grad, f"gradient of {name}")


@pytest.mark.parametrize("compare", ["keys", "cells", "tokens"])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_equals_the_reference(name: str, grid: TokenGrid, compare: str) -> None:
    length = {"keys": 0, "cells": grid.cells, "tokens": grid.tokens}[compare]
    features = torch.randn(2, length, 10, dtype=torch.float64) if length else None
    check_against_reference(CONFIGS[name], grid, torch.float64, Context(features=features, call_index=3, progress=0.2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_equals_the_reference_in_lower_precision(name: str, dtype: torch.dtype) -> None:
    grid = TokenGrid(5, 7, before=2, after=1)
    check_against_reference(CONFIGS[name], grid, dtype, Context(features=torch.randn(2, grid.tokens, 10)))


@pytest.mark.parametrize("kind", ["bool", "additive", "finite", "one head axis", "keys alone"])
@pytest.mark.parametrize("name", ["default", "proportional"])
def test_text_masks(name: str, kind: str) -> None:
    grid = TokenGrid(4, 5, before=3, after=4)
    visible = torch.ones(2, 1, 1, grid.tokens, dtype=torch.bool)
    visible[0, ..., -3:] = False
    visible[1, ..., :2] = False
    finite = torch.zeros(2, 3, 1, grid.tokens, dtype=torch.float64)
    finite[..., :3] = torch.randn(3, 1, 3, dtype=torch.float64)
    mask = {
        "bool": visible,
        "additive": torch.zeros(visible.shape, dtype=torch.float64).masked_fill(~visible, -torch.inf),
        "finite": finite,
        "one head axis": visible[:1].expand(1, 3, 1, -1),
        "keys alone": visible[0, 0, 0],
    }[kind]
    check_against_reference(CONFIGS[name], grid, torch.float64, Context(mask=mask))
    # against what merging does with the same tokens and no mask: hidden text must change something
    q, k, v = inputs(grid)
    mechanism = CONFIGS[name]
    assert not torch.allclose(
        mechanism.attend(q, k, v, grid, context=Context(mask=mask)), mechanism.attend(q, k, v, grid)
    )


# What the mechanism is


def blocks_alike(grid: TokenGrid, block: tuple[int, int, int]) -> tuple[list[Tensor], Tensor, Tensor]:
    """q, k, v and features that are alike inside each block, and the number of each cell's block."""
    shape = [size // side for size, side in zip(grid.shape, block, strict=True)]
    place = [axis // side for axis, side in zip(grid.positions(), block, strict=True)]
    number = (place[0] * shape[1] + place[1]) * shape[2] + place[2]
    blocks = torch.randn(3, 2, 3, int(number.max()) + 1, 8, dtype=torch.float64)
    features = torch.randn(2, int(number.max()) + 1, 16, dtype=torch.float64)
    cells = blocks[..., number, :]
    others = torch.randn(3, 2, 3, grid.others, 8, dtype=torch.float64)
    return [grid.join(*both) for both in zip(cells, others, strict=True)], features[:, number], number


@pytest.mark.parametrize("use_rand", [True, False])
@pytest.mark.parametrize(
    ("grid", "stride", "block"),
    [
        (TokenGrid(4, 6, before=2), (2, 2), (1, 2, 2)),
        (TokenGrid(4, 6, frames=2, after=3), (2, 3), (1, 2, 3)),
        (TokenGrid(4, 3, frames=4, before=1), (2, 2, 1), (2, 2, 1)),
    ],
    ids=str,
)
def test_equal_cells_merge_without_loss(
    grid: TokenGrid, stride: tuple[int, ...], block: tuple[int, int, int], use_rand: bool
) -> None:
    """With sizes counted the result is the softmax over all tokens, else that over one token of each block."""
    tensors, features, number = blocks_alike(grid, block)
    ratio = 1 - 1 / (block[0] * block[1] * block[2])
    mechanism = TokenMergeAttention(ratio=ratio, stride=stride, use_rand=use_rand, proportional=True)
    context = Context(features=features, call_index=1, progress=0.3)
    assert mechanism.merged(grid) == round(ratio * grid.cells)
    assert_close(mechanism.attend(*tensors, grid, context=context), softmax_reference(*tensors))

    first = torch.tensor([int((number == i).nonzero()[0]) for i in range(int(number.max()) + 1)])
    kept = [torch.cat([grid.split(t)[0][..., first, :], grid.split(t)[1]], dim=-2) for t in tensors[1:]]
    got = replace(mechanism, proportional=False).attend(*tensors, grid, context=context)
    assert_close(got, softmax_reference(tensors[0], *kept))


def test_frames_are_merged_by_themselves_unless_the_stride_has_three_axes() -> None:
    """Two frames alike in all: merging across frames is free of loss, merging inside them is not."""
    grid = TokenGrid(4, 4, frames=2)
    tensors, features, _ = blocks_alike(grid, (2, 1, 1))
    context = Context(features=features)
    across = TokenMergeAttention(ratio=0.5, stride=(2, 1, 1), proportional=True)
    assert_close(across.attend(*tensors, grid, context=context), softmax_reference(*tensors))
    inside = TokenMergeAttention(ratio=0.5, stride=(2, 2), proportional=True)
    out = inside.attend(*tensors, grid, context=context)
    assert (out - softmax_reference(*tensors)).abs().max() > 0.01
    # each frame keeps half of its cells, and shares no output with the other
    out = inside.attend(*inputs(grid), grid)
    assert [len(cells.unique(dim=0)) for cells in (out[0, 0, :16], out[0, 0, 16:], out[0, 0])] == [8, 8, 16]


def test_merged_cells_share_an_output_and_others_are_never_merged() -> None:
    grid = TokenGrid(6, 6, before=4, after=1)
    q, k, v = inputs(grid)
    out = TokenMergeAttention(ratio=0.5).attend(q, k, v, grid)
    cells, others = grid.split(out)
    assert all(len(cells[i, 0].unique(dim=0)) == 18 for i in range(2))
    assert all(len(others[i, 0].unique(dim=0)) == 5 for i in range(2))


def test_a_picture_does_not_depend_on_its_company() -> None:
    grid = TokenGrid(6, 8, before=2)
    q, k, v = (tensor.detach() for tensor in inputs(grid, batch=3))
    features = torch.randn(3, grid.cells, 12)
    mechanism = TokenMergeAttention()

    def attend(samples: list[int]) -> Tensor:
        context = Context(features=features[samples], call_index=5, progress=0.4)
        return mechanism.attend(q[samples], k[samples], v[samples], grid, context=context)

    together = attend([0, 1, 2])
    for samples in ([0], [1], [2], [2, 0], [1, 1]):
        assert_close(attend(samples), together[samples])
    guided = attend([1, 1])
    assert torch.equal(guided[0], guided[1])


def test_draws_depend_on_seed_layer_and_step_alone() -> None:
    grid = TokenGrid(16, 16)

    def draw(seed: int = 0, **context: Any) -> list[int]:
        return TokenMergeAttention(seed=seed).destinations(grid, Context(**context)).tolist()

    state = torch.get_rng_state()
    first = draw()
    torch.manual_seed(1)
    assert draw(features=torch.randn(2, 256, 4)) == first
    drawn = [draw(), draw(seed=1), draw(call_index=1), draw(progress=0.5)]
    assert len({tuple(cells) for cells in drawn}) == 4
    fixed = TokenMergeAttention(use_rand=False)
    assert fixed.destinations(grid, Context(call_index=3)).tolist() == merging.destinations(grid, 2, 2).tolist()
    q, k, v = inputs(TokenGrid(4, 4), torch.float32)
    torch.set_rng_state(state)
    TokenMergeAttention().attend(q, k, v, TokenGrid(4, 4))
    assert torch.equal(torch.get_rng_state(), state)


def test_what_is_asked_of_the_context() -> None:
    assert TokenMergeAttention().needs == {"features", "call_index", "progress"}
    assert TokenMergeAttention(use_rand=False, max_downsample=1).needs == {"features", "downsample"}


@pytest.mark.parametrize(
    ("grid", "stride", "merged"),
    [
        (TokenGrid(4, 4), (2, 2), 12),
        (TokenGrid(5, 7), (2, 2), 26),  # a share of 0.75; 6 destinations, and 29 that may merge
        (TokenGrid(2, 3), (2, 2), 4),
        (TokenGrid(1, 13), (2, 2), 7),  # blocks of 1 x 2
        (TokenGrid(1, 1), (2, 2), 0),
        (TokenGrid(4, 4, frames=3), (2, 2), 36),
        (TokenGrid(4, 4, frames=3), (2, 2, 2), 36),
        (TokenGrid(1, 2, frames=5), (2, 1, 2), 7),
    ],
    ids=str,
)
def test_how_many_are_merged(grid: TokenGrid, stride: tuple[int, ...], merged: int) -> None:
    assert TokenMergeAttention(ratio=0.75, stride=stride).merged(grid) == merged


def test_without_merging_it_is_the_softmax() -> None:
    for mechanism, grid, context in (
        (TokenMergeAttention(), TokenGrid(1, 1, before=3), Context()),
        (TokenMergeAttention(ratio=0.1), TokenGrid(3, 3), Context()),
        (TokenMergeAttention(max_downsample=1), TokenGrid(4, 4), Context(downsample=2)),
        (TokenMergeAttention(max_downsample=1), TokenGrid(4, 4), Context(downsample=2, mask=torch.eye(16).bool())),
    ):
        q, k, v = inputs(grid)
        want = F.scaled_dot_product_attention(q, k, v, attn_mask=context.mask)
        assert torch.equal(mechanism.attend(q, k, v, grid, context=context), want)
        assert mechanism.flops(grid, 3, 8, context=context) == 4 * grid.tokens**2 * 24
    grid = TokenGrid(4, 4)
    q, k, v = inputs(grid)
    assert not torch.equal(
        TokenMergeAttention(max_downsample=2).attend(q, k, v, grid, context=Context(downsample=2)),
        F.scaled_dot_product_attention(q, k, v),
    )


# In models


@pytest.mark.parametrize("build", [models.flux, models.sd15, models.wan], ids=lambda build: build.__name__)
def test_in_a_model(build: Callable[[], models.Tiny], monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = build()
    compared: list[bool] = []
    with torch.no_grad():
        plain = tiny.run()
        handle = diffattn.apply(tiny.model, "token_merge", ratio=0.5)
        swapped = tiny.run()
        assert (swapped - plain).abs().max() > 0.01
        assert torch.equal(tiny.run(), swapped)

        def by_reference(
            self: TokenMergeAttention, q: Tensor, k: Tensor, v: Tensor, grid: TokenGrid, **options: Any
        ) -> Tensor:
            assert options.pop("backend") == "auto"
            compared.append(options["context"].features is not None)
            return self.reference(q.double(), k.double(), v.double(), grid, **options).to(q.dtype)

        monkeypatch.setattr(TokenMergeAttention, "attend", by_reference)
        torch.testing.assert_close(tiny.run(), swapped, atol=2e-5, rtol=2e-5)
        assert compared == [True] * len(handle.layers)
        handle.restore()
        assert torch.equal(tiny.run(), plain)


def test_stable_diffusion_compares_the_input_of_the_block(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = models.sd15()
    blocks: list[Tensor] = []
    for name, module in tiny.model.named_modules():
        if name.endswith("transformer_blocks.0"):
            module.register_forward_pre_hook(lambda module, args: blocks.append(args[0]))
    plain_features, seen = merging.compared_features, []

    def compared_features(k: Tensor, grid: TokenGrid, context: Context) -> Tensor:
        features = plain_features(k, grid, context)
        seen.append(features)
        return features

    monkeypatch.setattr(merging, "compared_features", compared_features)
    with diffattn.apply(tiny.model, "token_merge", max_downsample=1), torch.no_grad():
        tiny.run()
    # the finest layers alone
    assert 0 < len(seen) < len(blocks)
    finest = [block for block in blocks if block.shape[1] == max(block.shape[1] for block in blocks)]
    assert all(torch.equal(one, other) for one, other in zip(seen, finest, strict=True))


@pytest.mark.filterwarnings("ignore:In CPU autocast:UserWarning")
@pytest.mark.parametrize("build", [models.sd15, models.mochi], ids=lambda build: build.__name__)
def test_the_samples_of_a_batch_do_not_meet_in_a_model(build: Callable[[], models.Tiny]) -> None:
    """Mochi calls its attention sample by sample."""
    tiny = build()
    size = len(tiny.inputs["encoder_hidden_states"])
    with diffattn.apply(tiny.model, "token_merge"), torch.no_grad():
        together = tiny.run().view(size, -1)
        for i in range(size):
            one = {
                name: value[i : i + 1] if isinstance(value, Tensor) and value.ndim else value
                for name, value in tiny.inputs.items()
            }
            torch.testing.assert_close(tiny.run(**one), together[i], atol=2e-5, rtol=2e-5)


def test_a_block_that_takes_text_apart_and_a_reference_picture_along() -> None:
    tiny = models.flux_kontext()
    with torch.no_grad():
        plain = tiny.run()
        with diffattn.apply(tiny.model, "token_merge"):
            assert (tiny.run() - plain).abs().max() > 0.01


# Configs and refusals


@pytest.mark.parametrize("mechanism", CONFIGS.values(), ids=str)
def test_json_round_trip(mechanism: TokenMergeAttention) -> None:
    assert config.from_json(config.to_json(mechanism)) == mechanism


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratio": 0}, r"at most 0.75, because each block of stride \(2, 2\) keeps a cell, got 0"),
        ({"ratio": 0.76}, r"at most 0.75, .*, got 0.76; use a smaller ratio or a larger stride"),
        ({"ratio": 0.6, "stride": (1, 2)}, r"at most 0.5, .* stride \(1, 2\)"),
        ({"ratio": -0.1}, "above 0"),
        ({"ratio": float("nan")}, "ratio must be a number"),
        ({"ratio": True}, "ratio must be a number"),
        ({"stride": (2,)}, r"stride must be \(\[frames,\] rows, columns\), ints of at least 1, got \(2,\)"),
        ({"stride": 2}, "stride must be"),
        ({"stride": (2, 0)}, "stride must be"),
        ({"stride": (2, 2.0)}, "stride must be"),
        ({"stride": (1, 1)}, r"a block of stride \(1, 1\) has nothing to merge"),
        ({"max_downsample": 0}, "max_downsample must be an int of at least 1, got 0"),
        ({"seed": -1}, "seed must be an int of at least 0, got -1"),
        ({"seed": 1.5}, "seed must be an int"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_wrong_options(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TokenMergeAttention(**options)  # type: ignore[arg-type]


def test_masks_that_merging_cannot_honour() -> None:
    grid = TokenGrid(3, 4, after=2)
    q, k, v = inputs(grid)
    hides_a_cell = torch.ones(1, 1, 1, 14, dtype=torch.bool)
    hides_a_cell[..., 3] = False
    weighs_a_cell = torch.zeros(1, 1, 1, 14, dtype=torch.float64)
    weighs_a_cell[..., 11] = 0.5
    for mask in (hides_a_cell, weighs_a_cell):
        with pytest.raises(ValueError, match="hides or weighs cells of the grid"):
            TokenMergeAttention().attend(q, k, v, grid, context=Context(mask=mask))
    with pytest.raises(ValueError, match=r"\(b, 1, 1, keys\), got \(14, 14\)"):
        TokenMergeAttention().attend(q, k, v, grid, context=Context(mask=torch.ones(14, 14, dtype=torch.bool)))


@pytest.mark.parametrize("name", ["default", "first cells", "across frames"])
def test_flops_are_those_computed(name: str) -> None:
    mechanism, grid = CONFIGS[name], TokenGrid(5, 6, frames=2, before=3)
    q, k, v = (tensor.detach() for tensor in inputs(grid, torch.float32, batch=1))
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        mechanism.attend(q, k, v, grid)
    assert mechanism.flops(grid, 3, 8) == counter.get_total_flops()
