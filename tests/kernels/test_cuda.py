"""What is laid out for CUDA, without a GPU: blocks, lists, coordinates, settings and refusals."""

import math
from types import SimpleNamespace

import pytest
import torch

from diffattn import ClearAttention, HaloAttention, NeighborhoodAttention, TokenGrid
from diffattn.kernels import choose, cuda, flex
from diffattn.kernels.block_lists import lists, paired, transposed, with_further
from diffattn.kernels.block_mask import cuda_blocks, key_coordinates, touched_blocks
from diffattn.kernels.call import window_call
from diffattn.kernels.choose import LIMITS, Thresholds, load_thresholds
from diffattn.kernels.order import TileOrder
from diffattn.kernels.pattern import Cells, dense_mask

CPU = torch.device("cpu")
CUDA = torch.device("cuda")
PATTERNS = [
    ClearAttention(radius=4),
    ClearAttention(radius=5, radius_t=2),
    HaloAttention(tile=8, halo=1),
    HaloAttention(tile=(8, 16), halo=1),
    NeighborhoodAttention(kernel_size=7),
    NeighborhoodAttention(kernel_size=(3, 5, 5), dilation=(1, 2, 2), is_causal=(True, False, True)),
    NeighborhoodAttention(kernel_size=(99, 99, 99)),
]


def computed(blocks, coordinates):
    """Which pairs the kernel computes and lets count, `(queries, keys)`."""
    rule = blocks.rule.mask_mod(coordinates)
    queries, keys = blocks.lengths
    none = torch.zeros((), dtype=torch.long)
    allowed = rule(none, none, torch.arange(queries)[:, None], torch.arange(keys)[None])
    out = torch.zeros(queries, keys, dtype=torch.bool)
    for counts, numbers, full in ((*blocks.lists[:2], False), (*blocks.lists[2:], True)):
        for row in range(counts.shape[-1]):
            for block in numbers[0, 0, row, : int(counts[0, 0, row])].tolist():
                part = (
                    slice(row * blocks.size[0], (row + 1) * blocks.size[0]),
                    slice(block * blocks.size[1], (block + 1) * blocks.size[1]),
                )
                assert not out[part].any(), "a block twice in one row"
                out[part] = True if full else allowed[part]
    return out


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("text", [0, 5, 128])
@pytest.mark.parametrize("shape", [(1, 19, 21), (3, 9, 20), (1, 1, 1)], ids=str)
@pytest.mark.parametrize("mechanism", PATTERNS, ids=str)
def test_the_pairs_are_those_of_the_dense_mask(mechanism, shape, text, backward):
    grid = TokenGrid(shape[1], shape[2], shape[0])
    pattern = mechanism.pattern(grid)
    shared = flex.cuda_plan(pattern, shape, text, CPU, backward)
    order = shared.order
    found = computed(shared.blocks, key_coordinates(order, shared.further, text, CPU))
    cells = order.from_tiles(order.from_tiles(found[None, None, :, : order.cells].float()).mT).mT[0, 0].bool()
    assert torch.equal(cells, dense_mask(pattern, grid))
    real = order.to_tiles(torch.ones(1, 1, math.prod(shape), 1)).flatten().bool()
    assert found[real, order.cells : order.cells + text].all()
    assert not found[real, order.cells + text :].any()
    assert not found[real][:, : order.cells][:, ~real].any()
    assert (shared.blocks.backward is not None) == backward


@pytest.mark.parametrize("mechanism", PATTERNS, ids=str)
def test_a_key_that_is_nowhere_is_never_seen(mechanism):
    grid = TokenGrid(9, 14, frames=4)
    place = [axis.float() for axis in grid.positions()]
    nowhere = Cells(*(torch.full_like(axis, torch.nan) for axis in place))
    assert not mechanism.pattern(grid).allowed(Cells(*place), nowhere).any()


def test_a_rule_that_does_not_hide_padding_is_refused(disc, monkeypatch):
    pattern = disc(2.125)
    monkeypatch.setattr(type(pattern), "allowed", lambda self, query, key: ~((query.row - key.row).abs() >= 2))
    with pytest.raises(ValueError, match="coordinates are NaN, and on CUDA padding has these"):
        flex.cuda_plan(pattern, (1, 9, 9), 0, CPU, False)


def test_a_single_frame_in_deep_tiles_has_the_rows_of_its_frame():
    order = TileOrder((1, 5, 6), (2, 2, 4))
    index = order.to_tiles(torch.arange(1.0, 31)[None, None, :, None]).flatten()
    cells = order.coordinates(torch.arange(order.cells))
    real = index > 0
    assert torch.equal((cells.row * 6 + cells.column + 1)[real], index[real])
    assert (cells.frame[~real] + (cells.row >= 5)[~real] + (cells.column >= 6)[~real] > 0).all()


def test_a_window_of_radius_8_computes_few_keys():
    """1012 in blocks of 128 x 128, 1864 in the order of the rows."""
    order = cuda.cuda_order(ClearAttention(radius=8).pattern(TokenGrid(128, 128)), (1, 128, 128), False)
    blocks = cuda_blocks(
        ClearAttention(radius=8).pattern(TokenGrid(128, 128)), order, 0, whole=True, backward=False, device=CPU
    )
    keys = (blocks.lists.partial_count + blocks.lists.full_count).float().mean() * blocks.size[1]
    assert blocks.size == (128, 64)
    assert keys <= 700


def test_halo_tiles_are_whole():
    pattern = HaloAttention(tile=8, halo=1).pattern(TokenGrid(64, 64))
    shared = flex.cuda_plan(pattern, (1, 64, 64), 0, CPU, False)
    assert shared.blocks.size == (64, 64)
    assert int(shared.blocks.lists.partial_count.sum()) == 0


def test_the_lists_of_a_large_grid_are_small():
    """From 67 MB as wide as all blocks; the CPU kernel wants them so wide."""
    pattern = ClearAttention(radius=8).pattern(TokenGrid(512, 512))
    shared = flex.cuda_plan(pattern, (1, 512, 512), 512, CPU, False)
    assert shared.blocks.bytes < 8e6
    assert shared.blocks.backward is None


@pytest.mark.parametrize("text", [0, 70])
def test_the_lists_by_keys_are_the_transposed(text):
    pattern = ClearAttention(radius=5).pattern(TokenGrid(21, 30))
    order = TileOrder((1, 21, 30), (1, 8, 8))
    touched = with_further(touched_blocks(pattern, order), order.tiles, -(-text // 64), 1)
    rows, columns = lists(touched), transposed(touched, order.tiles + -(-text // 64))
    for kind in (0, 2):
        pairs = {
            (query, key)
            for query in range(order.tiles)
            for key in rows[kind + 1][0, 0, query, : int(rows[kind][0, 0, query])].tolist()
        }
        turned = {
            (query, key)
            for key in range(columns[kind].shape[-1])
            for query in columns[kind + 1][0, 0, key, : int(columns[kind][0, 0, key])].tolist()
        }
        assert pairs == turned


def test_a_pair_of_tiles_sees_what_either_sees():
    pattern = ClearAttention(radius=5).pattern(TokenGrid(20, 28))
    order = TileOrder((1, 20, 28), (1, 4, 4), paired=True)
    single, double = touched_blocks(pattern, order), paired(touched_blocks(pattern, order))
    for pair in range(order.tiles // 2):
        seen, full = (
            [set(single.keys[tile][flags[tile]].tolist()) for tile in (2 * pair, 2 * pair + 1)]
            for flags in (single.seen, single.full)
        )
        assert double.keys[pair][double.seen[pair]].tolist() == sorted(seen[0] | seen[1])
        assert double.keys[pair][double.full[pair]].tolist() == sorted(full[0] & full[1])


def test_texts_within_a_multiple_of_128_have_lists_of_one_shape():
    pattern = ClearAttention(radius=4).pattern(TokenGrid(24, 40))
    shapes = {
        tuple(tensor.shape for tensor in flex.cuda_plan(pattern, (1, 24, 40), text, CPU, False).blocks.tensors)
        for text in (129, 200, 255, 256)
    }
    assert len(shapes) == 1


@pytest.mark.parametrize(
    ("sizes", "words"),
    [((8, 8), "16 to 256 numbers, and these have 8"), ((64, 12), "these have 64 and 12"), ((512, 512), "have 512")],
    ids=str,
)
def test_heads_that_no_kernel_takes_are_refused(sizes, words):
    refused = cuda.size_refused(*(torch.empty(1, 1, 1, size) for size in sizes))
    assert refused is not None
    assert words in refused
    assert cuda.size_refused(torch.empty(1, 1, 1, 72), torch.empty(1, 1, 1, 72)) is None


@pytest.mark.parametrize("text", [0, 9])
def test_small_heads_are_refused_on_cuda_alone(text, monkeypatch):
    grid = TokenGrid(64, 64, before=text)
    q = torch.empty(1, 1, grid.tokens, 8)
    call = window_call(q, q, q, grid, ClearAttention(radius=8).pattern(grid), 1.0, None, None)
    assert choose.flex_refuses(call) is None
    like_cuda = SimpleNamespace(grid=grid, q=SimpleNamespace(device=CUDA, shape=q.shape), v=q)
    assert "these have 8" in str(choose.flex_refuses(like_cuda))


@pytest.fixture
def card(monkeypatch):
    """Say what a card can do, and what there is to compile with."""

    def say(capability=(9, 0), compiler="/usr/bin/cc"):
        monkeypatch.setattr(cuda.importlib.util, "find_spec", lambda name: object())
        monkeypatch.setattr(cuda.shutil, "which", lambda name: compiler)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        return CUDA

    return say


def test_what_is_missing_on_a_card_is_told(card, monkeypatch):
    monkeypatch.delenv("CC", raising=False)
    assert cuda.cuda_refuses(card()) is None
    assert "compute capability 8.0 or more, and this one has 7.5" in str(cuda.cuda_refuses(card((7, 5))))
    assert "C compiler, and none was found (gcc, clang)" in str(cuda.cuda_refuses(card(compiler=None)))
    monkeypatch.setenv("CC", "none-such")
    assert "none was found (none-such)" in str(cuda.cuda_refuses(card(compiler=None)))
    monkeypatch.setattr(cuda.importlib.util, "find_spec", lambda name: None)
    assert cuda.cuda_refuses(CUDA) == "Triton is not installed"


def test_settings_divide_the_blocks(card):
    for capability in ((8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)):
        card(capability)
        for dtype in (torch.bfloat16, torch.float32):
            for head_dim in (16, 64, 72, 128, 160, 256):
                for size in ((128, 128), (128, 64), (64, 64), (64, 128)):
                    q = SimpleNamespace(device=CUDA, dtype=dtype, shape=(1, 1, 1, head_dim))
                    options = dict(cuda.cuda_options(q, size))
                    assert size[0] % options["fwd_BLOCK_M"] == 0
                    assert size[1] % options["fwd_BLOCK_N"] == 0


def test_the_thresholds_on_cuda_say_where_they_come_from():
    limits = LIMITS["cuda"]
    assert limits.source.startswith(("modelled", "measured on"))
    assert 0 < limits.dense_cells < limits.flex_cells < 10_000


def test_own_thresholds_take_the_place_of_ours(tmp_path):
    file = tmp_path / "thresholds.json"
    file.write_text('{"cuda": {"dense_cells": 7, "flex_cells": 9, "source": "measured on X"}}')
    found = load_thresholds(str(file))
    assert found["cuda"] == Thresholds(7, 9, "measured on X")
    assert found["cpu"] == LIMITS["cpu"]
    file.write_text('{"cuda": {"cells": 7}}')
    with pytest.raises(ValueError, match="DIFFATTN_THRESHOLDS must name a JSON file that gpu_check.py wrote"):
        load_thresholds(str(file))
    with pytest.raises(ValueError, match="DIFFATTN_THRESHOLDS"):
        load_thresholds(str(tmp_path / "none"))
