"""FlexAttention in tile order: its blocks are those of the dense mask, the compiled kernel gives the same numbers."""

import math

import pytest
import torch

from diffattn.grid import TokenGrid
from diffattn.kernels import flex
from diffattn.kernels.block_mask import TileRule, tile_blocks
from diffattn.kernels.order import TileOrder, tile_shape, whole_tile
from diffattn.kernels.pattern import dense_mask
from diffattn.measure.bench.row_major import row_major_blocks

needs_compiler = pytest.mark.skipif(
    flex.missing_compiler(torch.device("cpu")) is not None, reason="FlexAttention needs a C++ compiler and AVX2"
)


def blocks_of(mask):
    """Partial and full blocks as two boolean (rows, columns)."""
    found = []
    for count, indices in ((mask.kv_num_blocks, mask.kv_indices), (mask.full_kv_num_blocks, mask.full_kv_indices)):
        flags = torch.zeros(indices.shape[-2:], dtype=torch.bool)
        for row, number in enumerate(count.flatten().tolist()):
            flags[row, indices[0, 0, row, :number].long()] = True
            assert int(flags[row].sum()) == number, "an index twice in one row"
        found.append(flags)
    return found


def by_blocks(allowed, block):
    """Whether any, and whether all, of the pairs in each block are allowed; ragged ends by what there is of them."""

    def parted(value):
        rows, columns = (-size % block for size in allowed.shape)
        full = torch.nn.functional.pad(allowed, (0, columns, 0, rows), value=value)
        return full.unflatten(1, (-1, block)).unflatten(0, (-1, block))

    return parted(False).any(3).any(1), parted(True).all(3).all(1)


@pytest.mark.parametrize("extra", [0, 40])
@pytest.mark.parametrize(
    ("shape", "cells"), [((1, 16, 32), 32), ((1, 13, 22), 32), ((3, 7, 9), 16), ((1, 1, 1), 32), ((1, 48, 64), 128)]
)
@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("disc", [2]),
        ("disc", [9]),
        ("disc", [99]),
        ("lattice", [6]),
        ("bricks", [(1, 4, 4), 2]),
        ("bricks", [(2, 2, 2), 1]),
        ("bricks", [(2, 16, 24), 1]),
    ],
    ids=str,
)
def test_blocks_are_those_of_the_dense_mask(name, sizes, shape, cells, extra, request):
    pattern = request.getfixturevalue(name)(*sizes)
    tile = whole_tile(pattern, shape, cells) or tile_shape(pattern, shape, cells, True)
    order = TileOrder(shape, tile)
    mask = tile_blocks(pattern, order, extra).mask()
    assert mask.seq_lengths == (order.cells, order.cells + extra)
    partial, full = blocks_of(mask)

    # the dense mask, carried to tile order by the permutation of the data and not by the rule under test
    dense = dense_mask(pattern, TokenGrid(shape[1], shape[2], shape[0])).double()
    carried = order.to_tiles(order.to_tiles(dense[None, None]).transpose(2, 3)).transpose(2, 3)[0, 0].bool()
    real = order.to_tiles(torch.ones(1, 1, math.prod(shape), 1)).flatten().bool()
    carried = torch.nn.functional.pad(carried, (0, extra), value=True)

    rule = TileRule(pattern, order, extra > 0).mask_mod(())
    none = torch.zeros((), dtype=torch.long)
    ruled = rule(none, none, torch.arange(order.cells)[:, None], torch.arange(order.cells + extra)[None])
    assert torch.equal(ruled[real], carried[real])

    seen, whole = by_blocks(carried, order.block)
    assert not (partial & full).any()
    assert not (seen & ~(partial | full)).any(), "a block with visible keys is missing"
    rows = real.view(-1, order.block).all(1)  # of ragged rows more may be touched than is seen
    assert torch.equal((partial | full)[rows], seen[rows])
    assert torch.equal(full[rows], whole[rows])
    assert not (full & ~by_blocks(carried | ~real[:, None], order.block)[1]).any(), "a block is full and hides a key"


@pytest.mark.parametrize("tile", [(1, 4, 8), (2, 8, 6), (4, 16, 8)], ids=str)
def test_all_blocks_of_a_rule_on_tiles_are_full(tile, bricks):
    shared = flex.plan(bricks(tile, 1), (4, 32, 24), 20, torch.device("cpu"))
    assert not shared.order.ragged
    assert int(shared.blocks.lists.partial_count.sum()) == 0
    seen = dense_mask(bricks(tile, 1), TokenGrid(32, 24, 4)).sum()
    further = shared.order.tiles * -(-20 // shared.order.block)
    assert (int(shared.blocks.lists.full_count.sum()) - further) * shared.order.block**2 == seen


def test_partial_blocks_of_a_rule_on_tiles_hold_padding(bricks):
    shared = flex.plan(bricks((1, 8, 8), 1), (1, 44, 30), 0, torch.device("cpu"))
    partial, _ = blocks_of(shared.blocks.mask())
    last = torch.tensor([tile // 4 == 5 or tile % 4 == 3 for tile in range(24)])
    assert partial.any(0).equal(last)


def test_the_blocks_of_a_rule_on_tiles_take_no_time(bricks, monkeypatch):
    """One cell speaks for its tile: an 8K image asks for thousands of pairs, not for hundreds of millions."""
    pattern, asked = bricks((1, 32, 32), 2), []
    allowed = bricks.allowed
    monkeypatch.setattr(
        bricks, "allowed", lambda self, query, key: (found := allowed(self, query, key), asked.append(found.numel()))[0]
    )
    order = TileOrder((1, 512, 512), whole_tile(pattern, (1, 512, 512), 256))
    tile_blocks(pattern, order, 512)
    assert sum(asked) < 1e6


@pytest.mark.parametrize("grid", [TokenGrid(16, 24), TokenGrid(9, 13, frames=2, before=7, after=3)], ids=str)
def test_blocks_in_row_major_order_are_those_of_the_dense_mask(grid, disc):
    partial, full = blocks_of(row_major_blocks(disc(4), grid, block=32).mask())
    seen, whole = by_blocks(dense_mask(disc(4), grid), 32)
    assert torch.equal(partial | full, seen)
    assert torch.equal(full, whole)


def test_the_blocks_of_an_8k_picture_are_few(disc):
    pattern = disc(8)
    order = TileOrder((1, 512, 512), tile_shape(pattern, (1, 512, 512), 32, True))
    mask = tile_blocks(pattern, order, 512).mask()
    touched = mask.kv_num_blocks + mask.full_kv_num_blocks
    assert int(touched.max()) <= 16 + 25


COMPILED = [
    (TokenGrid(20, 24, before=5, after=2), {"pooled": 3, "batch": 2}, torch.float32),
    (TokenGrid(13, 17, before=40), {"mask": "bool", "batch": 2}, torch.float32),
    (TokenGrid(6, 9, frames=3), {}, torch.float32),
    (TokenGrid(24, 24, before=3), {"mask": "bias", "pooled": 2}, torch.bfloat16),
]


@pytest.mark.compile
@needs_compiler
@pytest.mark.parametrize(("grid", "options", "dtype"), COMPILED, ids=str)
@pytest.mark.slow
def test_the_compiled_kernel_equals_the_reference(grid, options, dtype, disc, make_case, tolerance):
    case = make_case(grid, disc(4), dim=16, dtype=dtype, **options)
    result = flex.flex_window_attention(case.call)
    assert (result - case.expected).abs().max() <= tolerance[dtype]


@pytest.mark.compile
@needs_compiler
@pytest.mark.parametrize("grid", [TokenGrid(36, 24, before=5), TokenGrid(29, 26)], ids=str)
@pytest.mark.slow
def test_the_compiled_kernel_on_whole_tiles_equals_the_reference(grid, bricks, make_case, tolerance):
    case = make_case(grid, bricks((1, 6, 6), 1), dim=16, dtype=torch.float32)
    result = flex.flex_window_attention(case.call)
    assert (result - case.expected).abs().max() <= tolerance[torch.float32]


@pytest.mark.compile
@needs_compiler
@pytest.mark.slow
def test_layers_share_one_compilation_and_the_order_outside_gives_the_same(disc, make_case):
    pattern, grid = disc(3), TokenGrid(16, 16)
    first, second = (make_case(grid, pattern, dim=16, dtype=torch.float32, seed=seed) for seed in (1, 2))
    compiled = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    results = [flex.flex_window_attention(case.call) for case in (first, second)]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == compiled + 1

    shared = flex.plan(pattern, grid.shape, 0, torch.device("cpu"))
    q, k, v = (shared.order.to_tiles(x) for x in (second.call.q, second.call.k, second.call.v))
    outside = flex.run_flex(q, k, v, shared.blocks, scale=second.call.scale)
    assert torch.equal(shared.order.from_tiles(outside), results[1])


@pytest.mark.compile
@needs_compiler
@pytest.mark.slow
def test_row_major_order_gives_the_same(disc, make_case, tolerance):
    grid = TokenGrid(15, 16, before=9)
    case = make_case(grid, disc(4), dim=16, dtype=torch.float32)
    mask = row_major_blocks(disc(4), grid)
    result = flex.run_flex(case.call.q, case.call.k, case.call.v, mask, scale=case.call.scale)
    assert (result - case.expected).abs().max() <= tolerance[torch.float32]


def test_what_is_tuned_for_the_cpu_is_put_back(monkeypatch):
    from torch._inductor import config

    template = flex._flex_template()
    before = template.GemmBlocking, config.cpp.march
    monkeypatch.setattr(flex, "_wide_moves", lambda: ("-mmove-max=256",))
    with flex.tuned(torch.device("cpu")):
        assert template.GemmBlocking(1, 16, 1).block_m == 8
        assert config.cpp.march == (before[1] or "native -mmove-max=256")
    assert (template.GemmBlocking, config.cpp.march) == before


def test_a_compiler_without_wide_moves_keeps_inductors_own_architecture(monkeypatch):
    from torch._inductor import config

    monkeypatch.setattr(flex, "_wide_moves", lambda: ())
    with config.patch({"cpp.march": None}), flex.tuned(torch.device("cpu")):
        assert config.cpp.march is None


def test_an_architecture_that_the_user_chose_is_kept():
    from torch._inductor import config

    with config.patch({"cpp.march": "x86-64-v3"}), flex.tuned(torch.device("cpu")):
        assert config.cpp.march == "x86-64-v3"


@needs_compiler
def test_a_compiler_without_the_flags_gets_none(monkeypatch):
    from torch._inductor import cpp_builder

    flex._wide_moves.cache_clear()
    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", lambda: "false")
    assert flex._wide_moves() == ()
    flex._wide_moves.cache_clear()
