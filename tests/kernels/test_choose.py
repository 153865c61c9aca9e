"""The choice of "auto", the refusals, and what is said about them."""

import logging

import pytest
import torch

from diffattn.grid import TokenGrid
from diffattn.kernels import dense, flex, window_attention
from diffattn.kernels.call import window_call
from diffattn.kernels.choose import BACKENDS, choose

LARGE = TokenGrid(128, 128)


@pytest.fixture
def compiler(monkeypatch):
    """Say whether there is one."""

    def say(missing):
        monkeypatch.setattr("diffattn.kernels.choose.missing_compiler", lambda device: missing)

    say(None)
    return say


@pytest.fixture
def avx512(monkeypatch):
    """Say whether the CPU has it."""

    def say(there):
        monkeypatch.setattr("diffattn.kernels.choose.has_avx512", lambda: there)

    say(True)
    return say


@pytest.fixture
def light_call(disc):
    """A call on many tokens without the dense reference."""

    def make(grid, pattern=None, *, dtype=torch.float32, grad=False, mask=None, pooled=None):
        q, k, v = (torch.zeros(1, 1, grid.tokens, 4, dtype=dtype, requires_grad=grad) for _ in range(3))
        return window_call(q, k, v, grid, pattern or disc(3), 0.5, mask, pooled)

    return make


def test_auto_takes_tiles_without_a_compiler_and_says_so(light_call, compiler):
    compiler("no C++ compiler found (g++)")
    choice = choose(light_call(LARGE))
    assert choice.backend == "tiled"
    assert "no C++ compiler found" in choice.reason


def test_auto_takes_flex_where_it_repays_its_compilation(light_call, compiler, avx512, bricks):
    assert choose(light_call(LARGE)).backend == "flex"
    avx512(False)
    choice = choose(light_call(LARGE))
    assert (choice.backend, choice.reason) == ("tiled", "without AVX-512 tiles are faster than flex")
    assert choose(light_call(TokenGrid(64, 64), bricks((1, 8, 8), 1))).backend == "flex"


def test_flex_refuses_more_cells_than_its_rule_can_count(light_call, compiler, monkeypatch):
    assert BACKENDS["flex"].refuses(light_call(LARGE)) is None
    monkeypatch.setattr("diffattn.kernels.choose.MOST_CELLS", 128 * 128 - 1)
    assert "counts up to 16383 cells, and the grid has 16384" in str(BACKENDS["flex"].refuses(light_call(LARGE)))


def test_auto_takes_tiles_for_gradients_on_a_cpu(light_call, compiler, avx512):
    choice = choose(light_call(LARGE, grad=True))
    assert choice.backend == "tiled"
    assert "no backward pass" in choice.reason
    with torch.no_grad():
        assert choose(light_call(LARGE, grad=True)).backend == "flex"


def test_auto_takes_tiles_in_float64(light_call, compiler):
    assert choose(light_call(LARGE, dtype=torch.float64)).backend == "tiled"


def test_auto_is_dense_where_the_pattern_saves_nothing(light_call, compiler, disc):
    assert choose(light_call(TokenGrid(8, 8))).backend == "dense"
    choice = choose(light_call(TokenGrid(64, 64), disc(99)))
    assert (choice.backend, choice.reason) == ("dense", "the window covers the grid")


def test_auto_is_dense_where_tiles_save_too_little(light_call, compiler, disc):
    choice = choose(light_call(TokenGrid(48, 48), disc(8)))
    assert choice.backend == "dense"
    assert "768 keys a query of 2304" in choice.reason
    assert choose(light_call(TokenGrid(60, 60), disc(4))).backend == "tiled"


def test_auto_is_dense_for_masks_that_differ_by_query(light_call, compiler):
    grid = TokenGrid(40, 40)
    mask = torch.ones(grid.tokens, grid.tokens, dtype=torch.bool)
    choice = choose(light_call(grid, mask=mask))
    assert choice.backend == "dense"
    assert "differs from query to query" in choice.reason


def test_a_window_over_the_whole_grid_builds_no_mask(light_call, disc, monkeypatch):
    monkeypatch.setattr(dense, "dense_mask", lambda *args: pytest.fail("a mask was built"))
    dense.dense_attention(light_call(TokenGrid(16, 16, before=2), disc(99)))


def test_each_choice_is_logged_once(caplog, disc):
    grid = TokenGrid(9, 31)
    q = torch.randn(1, 1, grid.tokens, 4)
    with caplog.at_level(logging.INFO, "diffattn"):
        for _ in range(3):
            window_attention(q, q, q, grid, disc(2.25), scale=0.5)
    (record,) = [record for record in caplog.records if record.name == "diffattn"]
    assert "9x31" in record.message
    assert "dense" in record.message


def test_unknown_backends_are_refused_with_the_known_ones(disc):
    q = torch.randn(1, 1, 4, 4)
    with pytest.raises(ValueError, match="unknown backend 'warp'; known: auto, dense, tiled, flex, natten, xformers"):
        window_attention(q, q, q, TokenGrid(2, 2), disc(1), scale=0.5, backend="warp")


def test_a_backend_that_cannot_says_why_and_which_can(disc):
    q = torch.randn(1, 1, 4, 4, requires_grad=True)
    with pytest.raises(ValueError, match="no backward pass on cpu; can: auto, dense, tiled"):
        window_attention(q, q, q, TokenGrid(2, 2), disc(1), scale=0.5, backend="flex")


def test_flex_without_a_compiler_is_refused(disc, compiler):
    compiler("no C++ compiler found (g++)")
    q = torch.randn(1, 1, 4, 4)
    with pytest.raises(ValueError, match="no C\\+\\+ compiler found"):
        window_attention(q, q, q, TokenGrid(2, 2), disc(1), scale=0.5, backend="flex")


def test_a_missing_compiler_is_noticed(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr(flex.torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    monkeypatch.setattr(flex.sys, "platform", "linux")
    assert flex.missing_compiler(torch.device("cpu")) == "no C++ compiler found (no-such-compiler)"


def test_dense_refuses_what_does_not_fit_and_names_the_others(light_call, monkeypatch):
    monkeypatch.setattr(dense, "free_bytes", lambda device: 10**6)
    with pytest.raises(MemoryError, match=r"4096 x 4096 tokens needs about 0.1 GB, and 0.0 GB are free.*tiled.*flex"):
        dense.dense_attention(light_call(TokenGrid(64, 64)))


def test_wrong_shapes_are_refused(disc):
    grid, q = TokenGrid(2, 2), torch.randn(1, 1, 4, 4)
    with pytest.raises(ValueError, match="count the text tokens"):
        window_attention(q, q, q, TokenGrid(2, 3), disc(1), scale=0.5)
    with pytest.raises(ValueError, match=r"must broadcast to .* got \(1, 1, 1, 3\)"):
        window_attention(q, q, q, grid, disc(1), scale=0.5, mask=torch.ones(1, 1, 1, 3, dtype=torch.bool))
