"""An order by centroids: every cell once, tiles of one size that hold like keys, and centroids that move slowly."""

import pytest
import torch
from memory import largest_tensor
from tolerances import assert_close
from torch import Tensor

from diffattn.kernels.routed import centroid_order, centroids, content_order
from diffattn.kernels.routed.centroids import means_of_tiles


def spread(keys: Tensor, order: Tensor, tile: int) -> float:
    """Sum of the squared distances to the means of the tiles."""
    return sum(
        float((keys[cells[cells >= 0]] - keys[cells[cells >= 0]].mean(0)).square().sum()) for cells in order.split(tile)
    )


@pytest.mark.parametrize(("cells", "tile", "block"), [(93, 16, 4), (96, 16, 16), (5, 8, 4), (33, 16, 2), (1, 4, 4)])
def test_each_cell_once_and_padding_at_the_end(cells: int, tile: int, block: int) -> None:
    keys, queries = torch.randn(2, 3, cells, 8)
    for _ in range(2):
        order, found = centroid_order(keys, queries, tile, block)
        tiles = -(-cells // tile)
        assert order.shape == (3, tiles * tile) and found.shape == (3, tiles, 8)
        assert (order[:, cells:] == -1).all()
        assert torch.equal(order[:, :cells].sort(dim=1).values, torch.arange(cells).expand(3, -1))
        keys = keys + 0.1 * torch.randn_like(keys)


def test_like_keys_come_into_one_tile_and_one_block() -> None:
    """Eight clusters of a tile each, and two of a block each in every one."""
    centres, within = 100 * torch.randn(8, 6), 10 * torch.randn(8, 2, 6)
    cluster, part = torch.arange(128).remainder(16).div(2, rounding_mode="floor"), torch.arange(128) % 2
    mixed = torch.randperm(128)
    cluster, part = cluster[mixed], part[mixed]
    keys = centres[cluster] + within[cluster, part] + 0.1 * torch.randn(128, 6)
    order = centroid_order(keys[None], torch.randn(1, 128, 6), tile=16, block=8)[0][0]
    assert all(len(set(cluster[tile].tolist())) == 1 for tile in order.view(8, 16))
    assert all(len(set(part[block].tolist())) == 1 for block in order.view(16, 8))


def test_tiles_are_tighter_than_those_of_the_tree_they_begin_with() -> None:
    """On keys in clusters of uneven size."""
    cluster = (30 * torch.rand(8, 256) ** 2).long()
    keys = (5 * torch.randn(8, 30, 6)).gather(1, cluster[..., None].expand(-1, -1, 6)) + torch.randn(8, 256, 6)
    first, tree = (make(keys, torch.eye(6).expand(8, -1, -1), 16, 16) for make in (centroid_order, content_order))
    assert sum(spread(*pair, 16) for pair in zip(keys, first[0], strict=True)) < sum(
        spread(*pair, 16) for pair in zip(keys, tree, strict=True)
    )


def test_keys_go_to_the_half_of_the_centroids_that_is_nearer() -> None:
    keys = torch.tensor([[[5.0], [1.0], [7.0], [3.0]]], dtype=torch.float64)
    queries = torch.ones_like(keys)
    up, down = (torch.tensor([[[a], [b]]], dtype=torch.float64) for a, b in ((0, 1), (1, 0)))
    assert centroid_order(keys, queries, 2, 2, up)[0][0].view(2, 2).sort().values.tolist() == [[1, 3], [0, 2]]
    assert centroid_order(keys, queries, 2, 2, down)[0][0].view(2, 2).sort().values.tolist() == [[0, 2], [1, 3]]


def test_centroids_move_towards_the_means_of_their_keys() -> None:
    keys, queries = torch.randn(2, 3, 45, 8, dtype=torch.float64)
    order, first = centroid_order(keys, queries, 8, 4)
    assert_close(first, 0.5 * first + 0.5 * means_of_tiles(keys, order, 8))
    moved = keys + 3
    order, second = centroid_order(moved, queries, 8, 4, first)
    means = torch.stack(
        [torch.stack([moved[g, tile[tile >= 0]].mean(0) for tile in order[g].split(8)]) for g in range(3)]
    )
    assert_close(second, 0.5 * first + 0.5 * means)


def test_a_sample_alone_has_the_order_that_it_has_among_others() -> None:
    keys, queries = torch.randn(2, 6, 100, 8)
    first, kept = centroid_order(keys, queries, 16, 4)
    second, _ = centroid_order(keys + 0.3, queries, 16, 4, kept)
    for own in range(6):
        part = slice(own, own + 1)
        alone, left = centroid_order(keys[part], queries[part], 16, 4)
        assert torch.equal(alone, first[part])
        assert torch.equal(centroid_order(keys[part] + 0.3, queries[part], 16, 4, left)[0], second[part])


def test_half_precision_is_ordered_in_float32() -> None:
    keys, queries = torch.randn(2, 2, 64, 8).bfloat16()
    order, found = centroid_order(keys, queries, 16, 4)
    assert found.dtype == torch.float32
    assert torch.equal(order, centroid_order(keys.float(), queries.float(), 16, 4)[0])


def test_keys_that_are_all_alike_are_taken() -> None:
    order, found = centroid_order(torch.ones(1, 40, 4), torch.zeros(1, 40, 4), 16, 4)
    assert torch.equal(order[0, :40].sort().values, torch.arange(40)) and found.isfinite().all()


def test_it_holds_no_keys_by_centroids(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(centroids, "ITERATIONS", 1)
    keys, queries = torch.randn(2, 1, 4096, 4)
    assert largest_tensor(lambda: centroid_order(keys, queries, 4, 4)) <= 2 * 8 * 4096 * 4
