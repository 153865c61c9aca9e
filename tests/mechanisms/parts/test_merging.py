"""Token merging: which tokens are matched, merged and put back."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tolerances import assert_close

from diffattn.grid import TokenGrid
from diffattn.mechanisms.base import Context
from diffattn.mechanisms.parts import merging
from diffattn.mechanisms.parts.merging import (
    Stage,
    checked_stages,
    compared_features,
    count_destinations,
    count_merged,
    destinations,
    groups_reference,
    match,
    refuse_mask,
    seeded_generator,
    stage_at,
)


def test_destinations_are_the_first_cell_of_every_whole_block() -> None:
    assert destinations(TokenGrid(4, 6), sx=3, sy=2).tolist() == [0, 3, 12, 15]
    # the last row and column fill no block; the second frame starts at cell 35
    ragged = TokenGrid(5, 7, frames=2)
    assert destinations(ragged, sx=3, sy=2).tolist() == [0, 3, 14, 17, 35, 38, 49, 52]
    assert count_destinations(ragged, sx=3, sy=2) == 8


@given(
    st.integers(1, 3), st.integers(2, 9), st.integers(2, 9), st.integers(1, 3), st.integers(1, 3), st.integers(0, 99)
)
def test_drawn_destinations_lie_one_in_every_block(
    frames: int, rows: int, columns: int, sx: int, sy: int, seed: int
) -> None:
    grid = TokenGrid(rows, columns, frames)
    sx, sy = min(sx, columns), min(sy, rows)
    drawn = destinations(grid, sx, sy, torch.Generator().manual_seed(seed))
    assert torch.equal(drawn, drawn.sort().values)
    frame, row, column = (axis[drawn] for axis in grid.positions())
    blocks = list(zip(frame.tolist(), (row // sy).tolist(), (column // sx).tolist(), strict=True))
    want = [(f, y, x) for f in range(frames) for y in range(rows // sy) for x in range(columns // sx)]
    assert sorted(blocks) == want
    assert len(drawn) == count_destinations(grid, sx, sy)


def test_every_cell_of_a_block_can_be_drawn() -> None:
    grid = TokenGrid(40, 40)
    row, column = (axis[destinations(grid, 4, 2, torch.Generator().manual_seed(0))] for axis in grid.positions()[1:])
    assert set(zip((row % 2).tolist(), (column % 4).tolist(), strict=True)) == {
        (y, x) for y in range(2) for x in range(4)
    }


def test_blocks_over_several_frames() -> None:
    grid = TokenGrid(4, 5, frames=5)
    assert destinations(grid, sx=2, sy=2, st=2).tolist() == [0, 2, 10, 12, 40, 42, 50, 52]
    drawn = destinations(grid, 2, 2, torch.Generator().manual_seed(5), st=2)
    blocks = [axis[drawn] // 2 for axis in grid.positions()]
    assert sorted(zip(*(block.tolist() for block in blocks), strict=True)) == [
        (f, y, x) for f in range(2) for y in range(2) for x in range(2)
    ]
    inside = {
        tuple(int(axis[cell]) % 2 for axis in grid.positions())
        for seed in range(20)
        for cell in destinations(grid, 2, 2, torch.Generator().manual_seed(seed), st=2)
    }
    assert len(inside) == 8
    assert count_destinations(grid, sx=2, sy=2, st=2) == 8
    assert count_merged(grid, 2, 2, 1.0, st=2) == 92


def test_matching_in_parts_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    features, dst = torch.randn(2, 40, 6, dtype=torch.float64), torch.arange(0, 40, 4)
    whole = match(features, dst)
    monkeypatch.setattr(merging, "MOST_SIMILARITIES", 140)
    parts = match(features, dst)
    assert torch.equal(parts.order, whole.order) and torch.equal(parts.target, whole.target)


def test_match_takes_the_most_similar_and_breaks_ties_by_token_id() -> None:
    east, north, west = [1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]
    features = torch.tensor([[east, north, [2.0, 0.1], north, west, [5.0, 0.0], [0.0, 0.0]]])
    pairs = match(features, torch.tensor([0, 1]))
    assert pairs.src.tolist() == [2, 3, 4, 5, 6]
    # 3 and 5 are alike to their best (1.0), then 2; 4 and the zero vector tie at 0 with dst 1 and dst 0
    assert pairs.src[pairs.order].tolist() == [[3, 5, 2, 4, 6]]
    assert pairs.dst[pairs.target].tolist() == [[1, 0, 0, 1, 0]]


@pytest.mark.parametrize("count", [0, 1, 7, 12])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_merging_equals_the_loops(count: int, dtype: torch.dtype) -> None:
    grid = TokenGrid(5, 3)
    features, tokens = torch.randn(2, 15, 6, dtype=dtype), torch.randn(2, 4, 15, 8, dtype=dtype)
    dst = destinations(grid, 1, 2, torch.Generator().manual_seed(1))[:3]
    merging = match(features, dst).first(count)
    assert merging.members.shape == (2, 15 - count)
    merged = merging.merge(tokens)
    unmerged = merging.unmerge(merged)
    for sample in range(2):
        groups = groups_reference(features[sample].tolist(), dst.tolist(), count)
        want = torch.stack([tokens[sample, :, group].double().mean(dim=-2) for group in groups], dim=-2)
        assert_close(merged[sample], want)
        for index, group in enumerate(groups):
            for token in group:
                assert torch.equal(unmerged[sample, :, token], merged[sample, :, index])


def test_sums_of_large_groups_fit() -> None:
    """A sum of 1000 tokens of 100 is beyond float16."""
    merging = match(torch.ones(1, 1000, 4), torch.tensor([0])).first(999)
    tokens = torch.full((1, 1000, 2), 100, dtype=torch.float16)
    assert torch.equal(merging.merge(tokens), tokens[:, :1])


def test_merging_no_token_is_the_identity() -> None:
    tokens = torch.randn(2, 12, 4)
    merging = match(torch.randn(2, 12, 5), torch.arange(3)).first(0)
    assert torch.equal(merging.unmerge(merging.merge(tokens)), tokens)


def test_merging_gradients() -> None:
    merging = match(torch.randn(1, 8, 3), torch.tensor([1, 6])).first(4)
    tokens = torch.randn(1, 2, 8, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda tokens: merging.unmerge(merging.merge(tokens)).sin(), (tokens,))


def test_zero_features_merge_without_nan() -> None:
    merging = match(torch.zeros(1, 9, 4), torch.tensor([0, 4])).first(5)
    assert merging.merge(torch.ones(1, 9, 2)).isfinite().all()


def test_autocast_does_not_coarsen_the_similarities() -> None:
    features, dst = torch.randn(1, 200, 16), torch.arange(0, 200, 4)
    want = match(features, dst)
    with torch.autocast("cpu", torch.bfloat16):
        got = match(features, dst)
    assert torch.equal(got.order, want.order)


def test_no_more_is_merged_than_there_are_sources() -> None:
    grid = TokenGrid(8, 8)
    assert count_merged(grid, 2, 2, 0.4) == 25
    assert count_merged(grid, 2, 2, 1.0) == 48
    assert count_merged(grid, 1, 1, 0.5) == 0


def test_stages_change_at_their_ends() -> None:
    stages = checked_stages([(0.4, 4, 4, 0.4, 0.95), (1.0, 2, 2, 0.3)])
    assert stages[1] == Stage(1.0, 2, 2, 0.3, 0.0)
    assert [stage_at(stages, step / 50) for step in (0, 19)] == [stages[0]] * 2
    assert [stage_at(stages, step / 50) for step in (20, 49)] == [stages[1]] * 2
    assert stage_at(stages, 1.0) == stages[1]
    assert stage_at(stages, None) == stages[0]


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([(0.5, 2, 2, 0.4, 0.9)], "last stage must have until=1.0, got 0.5"),
        ([(0.5, 2, 2, 0.4, 0.9), (0.5, 2, 2, 0.4, 0.9)], "must end after the one before it"),
        ([(1.0, 0, 2, 0.4, 0.9)], "sx and sy must be ints of at least 1, got 0 and 2"),
        ([(1.0, 2, 2.0, 0.4, 0.9)], "sx and sy must be ints"),
        ([(1.0, 2, 2, 1.4, 0.9)], "ratio and agent_ratio must lie in 0-1, got 1.4"),
        ([(1.0, 2, 2, 0.4, -0.1)], "must lie in 0-1"),
    ],
)
def test_wrong_stages(stages: list[tuple[float, ...]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        checked_stages(stages)


def test_a_stage_refuses_a_grid_without_blocks() -> None:
    stage = Stage(1.0, sx=4, sy=2, ratio=0.5)
    stage.check(TokenGrid(2, 4))
    for grid in (TokenGrid(1, 4), TokenGrid(2, 3)):
        with pytest.raises(ValueError, match="does not fit the grid"):
            stage.check(grid)


def test_the_generator_depends_on_seed_layer_and_step_alone() -> None:
    def draw(seed: int, layer: int, progress: float | None) -> list[int]:
        generator = seeded_generator(seed, Context(call_index=layer, progress=progress))
        return torch.randint(1000, (8,), generator=generator).tolist()

    state = torch.get_rng_state()
    first = draw(3, 2, 0.5)
    assert draw(3, 2, 0.5) == first
    others = [draw(4, 2, 0.5), draw(3, 1, 0.5), draw(3, 2, 0.52), draw(3, 2, None)]
    assert all(other != first for other in others)
    assert torch.equal(torch.get_rng_state(), state)


def test_compared_features() -> None:
    grid = TokenGrid(2, 3, before=1, after=2)
    keys, features = torch.randn(2, 4, 9, 5), torch.randn(2, 9, 7)
    own = compared_features(keys, grid, Context())
    assert torch.equal(own[:, 2], keys[:, :, 3].flatten(1))
    assert torch.equal(compared_features(keys, grid, Context(features=features)), features[:, 1:7])
    assert torch.equal(compared_features(keys, grid, Context(features=features[:, :6])), features[:, :6])
    # text in an argument of its own: a block's input is then the image with the tokens after it, or before it
    assert torch.equal(compared_features(keys, grid, Context(features=features[:, 1:])), features[:, 1:7])
    assert torch.equal(compared_features(keys, grid, Context(features=features[:, :7])), features[:, 1:7])
    with pytest.raises(ValueError, match=r"one feature per cell or per token .*\(6 or 9\), got 5"):
        compared_features(keys, grid, Context(features=features[:, :5]))
    # with nothing before, padding may come along and the text not
    first = TokenGrid(2, 3, after=3)
    for count in range(6, 10):
        assert torch.equal(compared_features(keys, first, Context(features=features[:, :count])), features[:, :6])


def test_a_mask_is_refused() -> None:
    refuse_mask(Context())
    with pytest.raises(ValueError, match="takes no mask"):
        refuse_mask(Context(mask=torch.ones(1, 1, 1, 4, dtype=torch.bool)))
