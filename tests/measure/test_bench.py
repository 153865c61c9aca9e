"""The benchmark measures what it says, and keeps silent about speed where the result is wrong."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from typer.testing import CliRunner

from diffattn import ClearAttention, HaloAttention, NeighborhoodAttention, SoftmaxAttention, TokenGrid
from diffattn.cli import app
from diffattn.kernels.call import WindowCall
from diffattn.kernels.flex import missing_compiler
from diffattn.measure import Timing
from diffattn.measure.bench import Case, Row, Settings, markdown, run, tables
from diffattn.measure.bench.accuracy import checked_queries, error_of, mask_rows, reduced
from diffattn.measure.bench.contestants import select
from diffattn.measure.bench.results import FULL, OFFICIAL, ROW_MAJOR
from diffattn.measure.bench.run import with_ratios
from diffattn.measure.cost import as_in_a_model
from diffattn.mechanisms import Mechanism
from diffattn.mechanisms.agent import AgentAttention
from diffattn.mechanisms.patterns import CrissCrossAttention, GlobalContextAttention

SMALL = Settings(
    grids=(TokenGrid(10, 6, before=3),), radii=(2,), rows=("tiled", "dense"), heads=2, head_dim=8, rounds=2
)


def _row(name: str, seconds: float, passed: bool = True) -> Row:
    return Row(name, "clear", Timing((seconds,)), 10, 2**20, 1e-7, passed, None, None, None, None)


@pytest.mark.parametrize("grid", [TokenGrid(7, 5, before=3, after=2), TokenGrid(3, 4, frames=5)], ids=str)
def test_mask_rows_are_rows_of_the_mask(grid: TokenGrid) -> None:
    mechanism = ClearAttention(radius=2)
    rows = torch.arange(grid.tokens)[::2]
    assert torch.equal(mask_rows(mechanism.pattern(grid), grid, rows), mechanism.mask(grid)[rows])


def test_the_checked_queries_reach_text_and_corners() -> None:
    grid = TokenGrid(100, 200, before=5, after=7)
    rows = set(checked_queries(grid).tolist())
    assert {0, 5, 5 + 199, 5 + 100 * 200 - 1, grid.tokens - 1} <= rows
    assert len(rows) > 60


def test_errors_are_those_of_the_wrong_queries() -> None:
    grid, mechanism = TokenGrid(6, 5, before=2), ClearAttention(radius=2)
    q, k, v = replace(SMALL, grids=(grid,)).tensors(grid)
    out = mechanism.reference(q, k, v, grid)
    assert error_of(mechanism, out, grid, q, k, v) < 1e-6
    out[..., -1, 0] += 0.25
    assert error_of(mechanism, out, grid, q, k, v) == pytest.approx(0.25, abs=1e-6)
    assert error_of(SoftmaxAttention(), out, grid, q, k, v) > 0.1


def test_mechanisms_that_are_no_windows_meet_their_own_reference() -> None:
    grid = TokenGrid(80, 60)
    assert reduced(grid) == TokenGrid(20, 30)
    assert reduced(TokenGrid(32, 32, frames=64, before=512)) == TokenGrid(8, 8, frames=16, before=64)
    q, k, v = SMALL.tensors(TokenGrid(4, 4))
    assert error_of(AgentAttention(num_agents=16), q, grid, q, k, v) < 1e-5
    for scaled in (ClearAttention(radius=2, proportional=True), SoftmaxAttention(proportional=True)):
        assert error_of(scaled, q, grid, q, k, v) < 1e-5


@pytest.mark.parametrize(
    "mechanism",
    [
        ClearAttention(radius=2, pool=2),
        ClearAttention(radius=2, down_factor=2),
        CrissCrossAttention(pool=2),
        GlobalContextAttention(window=3),
        GlobalContextAttention(window=2, by="queries", pool=2),
        HaloAttention(tile=2, halo=1, pool=2),
        NeighborhoodAttention(kernel_size=3, pool=2),
    ],
    ids=str,
)
def test_windows_with_means_are_held_to_more_than_their_window(mechanism: Mechanism) -> None:
    grid = TokenGrid(8, 6, before=3)
    q, k, v = SMALL.tensors(grid)
    with torch.no_grad():
        out = mechanism.attend(q, k, v, grid, context=as_in_a_model(mechanism, q))
        assert error_of(mechanism, out, grid, q, k, v) < 1e-5


def test_ratios_are_over_full_attention_and_the_official_order() -> None:
    rows = [_row(FULL, 8), _row(OFFICIAL, 4), _row(ROW_MAJOR, 2), _row("tile order", 1)]
    full, official, _, tile = with_ratios(rows)
    assert (tile.full_ratio, tile.official_ratio, tile.row_major_ratio) == (8, 4, 2)
    assert (full.full_ratio, official.official_ratio) == (1, 1)


def test_a_failed_row_gets_no_ratio_and_is_no_baseline() -> None:
    _, official, tile = with_ratios([_row(FULL, 8), _row(OFFICIAL, 4, passed=False), _row("tile order", 1)])
    assert (official.full_ratio, official.official_ratio) == (None, None)
    assert (tile.full_ratio, tile.official_ratio) == (8, None)


def test_the_bound_is_full_attention_times_the_density() -> None:
    assert Case(TokenGrid(4, 4), "", (_row(FULL, 8),), 0.25).bound == 2
    [case] = run(SMALL).cases
    assert case.density == pytest.approx(float(ClearAttention(radius=2).mask(case.grid).float().mean()))


@pytest.mark.slow
def test_a_run_checks_and_times_every_row() -> None:
    result = run(replace(SMALL, mechanisms=(AgentAttention(num_agents=4),), scaling=True))
    windows, others = result.cases
    assert [row.name for row in windows.rows] == [FULL, "SDPA on tiles", "dense mask"]
    assert [row.mechanism for row in others.rows] == ["softmax()", "agent(num_agents=4)"]
    for row in windows.rows + others.rows:
        assert row.passed and row.error < 2e-5 and len(row.timing.seconds) == 2 and row.full_ratio
    [scaling] = result.scaling
    assert (scaling.small, scaling.large) == (TokenGrid(10, 6, before=3), TokenGrid(20, 12, before=3))
    per_token = [scaling.seconds_small.median / 63, scaling.seconds_large.median / 243]
    assert scaling.ratio == pytest.approx(per_token[1] / per_token[0])


def test_inputs_depend_on_the_seed_only() -> None:
    grid = SMALL.grids[0]
    again, other = replace(SMALL, rounds=9), replace(SMALL, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(SMALL.tensors(grid), again.tensors(grid), strict=True))
    assert not torch.equal(SMALL.tensors(grid)[0], other.tensors(grid)[0])


def test_no_speed_up_is_printed_beside_a_wrong_result(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    right = AgentAttention.attend

    def wrong(self: AgentAttention, q: Tensor, *rest: Any, **options: Any) -> Tensor:
        return right(self, q, *rest, **options) + 1e-3

    monkeypatch.setattr(AgentAttention, "attend", wrong)
    options = ["--grid", "8x8", "--radius", "2", "--backends", "tiled", "--rounds", "1", "--output", str(tmp_path)]
    result = CliRunner().invoke(app, ["bench", *options])
    assert result.exit_code == 1 and "refused" in result.output
    written = json.loads((tmp_path / "bench.json").read_text())
    agent = written["cases"][1]["rows"][1]
    assert not written["passed"] and not agent["passed"]
    assert agent["full_ratio"] is None and agent["error"] == pytest.approx(1e-3, rel=0.1)


@pytest.mark.slow
def test_the_command_writes_json_markdown_and_a_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    options = [
        "--grid",
        "8x8",
        "--grid",
        "2x6x6",
        "--radius",
        "2",
        "--backends",
        "tiled",
        "--text",
        "4",
    ]
    result = CliRunner().invoke(app, ["bench", *options, "--rounds", "1", "--heads", "2", "--output", str(tmp_path)])
    assert result.exit_code == 0, result.output
    written = json.loads((tmp_path / "bench.json").read_text())
    assert [(case["grid"], case["title"]) for case in written["cases"]] == [
        (grid, title) for grid in ("4+8x8", "4+2x6x6") for title in ("CLEAR, radius 2", "other mechanisms")
    ]
    assert {"cpu", "threads", "torch", "load_average"} <= written["hardware"].keys()
    assert written["settings"]["heads"] == 2 and written["tolerance"] == 2e-5
    text = (tmp_path / "bench.md").read_text()
    assert "| SDPA on tiles |" in text and "bound" in text and written["hardware"]["cpu"] in text
    with Image.open(tmp_path / "bench.png") as plot:
        assert plot.width > 1000


def test_markdown_and_tables_mark_what_failed() -> None:
    result = run(SMALL)
    [case] = result.cases
    broken = replace(case, rows=tuple(with_ratios([case.rows[0], replace(case.rows[1], passed=False)])))
    text = markdown(replace(result, cases=(broken,)))
    assert text.count("refused") == 3 and "FAILED" in text
    [table] = tables(replace(result, cases=(broken,)))
    assert [row.style for row in table.rows] == [None, "red"]


@pytest.mark.compile
@pytest.mark.slow
def test_the_compiled_rows_agree_with_the_reference_and_each_other() -> None:
    if missing_compiler(torch.device("cpu")) is not None:
        pytest.skip("FlexAttention cannot be compiled here")
    rows = ("official", "row-major", "tile", "tile-once")
    result = run(replace(SMALL, rows=rows, grids=(TokenGrid(12, 10, before=3, after=2),), rounds=1))
    _, official, *tiles = result.cases[0].rows
    assert result.passed and result.skipped == () and official.official_error == 0
    for row in tiles:
        assert row.official_error is not None and row.official_error < 2e-5 and row.official_ratio


def test_rows_that_cannot_run_are_named_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffattn.measure.bench.contestants.free_bytes", lambda device: 1000)
    result = run(replace(SMALL, dtype=torch.float64, rows=("tile", "tiled", "dense")))
    assert [row.name for row in result.cases[0].rows] == [FULL, "SDPA on tiles"] and result.passed
    assert "tile order of clear(radius=2) on 3+10x6: it has no kernel for torch.float64" in result.skipped
    assert any(text.startswith("dense mask of") and "GiB" in text for text in result.skipped)


def test_the_dense_mask_of_a_large_grid_runs_only_when_asked_for() -> None:
    tensors = replace(SMALL, heads=1).tensors(TokenGrid(100, 100))
    call = WindowCall(*tensors, TokenGrid(100, 100), ClearAttention(radius=2).pattern(TokenGrid(100, 100)), 1.0)
    rows, skipped = select(None, call)
    assert "tiled" in rows and "dense" not in rows and "--backends dense" in skipped["dense"]
    assert select(("dense",), call) == (["dense"], {})
