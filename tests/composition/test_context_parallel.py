"""Context parallelism: two processes on this machine, each with half of the tokens, beside one with all of them."""

from typing import Any

import pytest
from context_parallel_ranks import Results, run_ranks

pytestmark = pytest.mark.dist

TOLERANCE = 1e-5
VISIBLE = 1e-3

ULYSSES, RING = "Context parallelism, Ulysses", "Context parallelism, ring"


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[Results]:
    return run_ranks(tmp_path_factory.mktemp("ranks"))


def found(ranks: list[Results], case: str) -> list[dict[str, Any]]:
    """What both ranks found in one case."""
    results = [rank[case] for rank in ranks]
    failures = [result["failed"] for result in results if "failed" in result]
    assert not failures, failures[0]
    return results


def family(name: str, note: str = "", cell: str | None = None) -> Any:
    return pytest.param(name, marks=pytest.mark.cell(ULYSSES, family=cell or name, outcome="works", note=note))


@pytest.mark.parametrize(
    "family",
    [
        family("Flux", "the model's own `_cp_plan`; gradients too"),
        family("Flux-Kontext"),
        family("Flux2"),
        family("Wan"),
        family("LTX", "without a text mask, which diffusers' own cross-attention refuses on several ranks"),
        family("Qwen-Image"),
        family("Qwen-Image-Edit"),
    ],
)
@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.slow
def test_ranks_equal_one_process(family: str, order: str, ranks: list[Results]) -> None:
    for result in found(ranks, f"{family}, {order}"):
        assert result["plain error"] < TOLERANCE, "parallelism itself changes the model: the test proves nothing"
        assert result["reached"]
        assert result["error"] < TOLERANCE
        assert result["change"] > VISIBLE
        assert result["restored"]


@pytest.mark.cell(ULYSSES, family="Flux", outcome="works")
@pytest.mark.parametrize(
    "case",
    [
        "agent",
        "weights for all heads",
        "uneven heads",
        "min_tokens between a rank's and all",
        "min_tokens of all, uneven",
        "steps",
    ],
)
def test_other_settings(case: str, ranks: list[Results]) -> None:
    for result in found(ranks, case):
        assert result["error"] < TOLERANCE and result["change"] > VISIBLE and result["restored"]


@pytest.mark.cell("`routing` and `pool=`: context parallelism, Ulysses", family="Flux", outcome="works")
@pytest.mark.parametrize("case", ["routing", "routing by content", "routing by centroids", "pool"])
def test_exact_tiles_and_means(case: str, ranks: list[Results]) -> None:
    """Each rank has all tokens of its heads, so that tiles and their statistics are those of one process."""
    test_other_settings(case, ranks)


@pytest.mark.cell(ULYSSES, family="Flux", outcome="works")
def test_heads_of_several_kinds(ranks: list[Results]) -> None:
    """Three heads on a rank: the second one begins with a head of the other kind."""
    test_other_settings("kinds of heads", ranks)


@pytest.mark.cell(ULYSSES, family="Qwen-Image", outcome="works", note="any number of tokens with `ulysses_anything`")
def test_ranks_with_unequal_parts(ranks: list[Results]) -> None:
    """Masked text of five tokens, three of them on the first rank."""
    for result in found(ranks, "uneven tokens"):
        assert result["error"] < TOLERANCE and result["change"] > VISIBLE and result["restored"]


@pytest.mark.cell(ULYSSES, family="Flux", outcome="works")
def test_calls_below_min_tokens_are_the_models_own(ranks: list[Results]) -> None:
    for result in found(ranks, "min_tokens above all"):
        assert result["from plain"] == 0 and result["error"] > VISIBLE


@pytest.mark.cell(ULYSSES, family="Flux", outcome="works")
@pytest.mark.parametrize("case", ["gradients", "gradients, checkpointing"])
def test_gradients_of_the_ranks_add_up(case: str, ranks: list[Results]) -> None:
    for result in found(ranks, case):
        assert result["error"] < TOLERANCE and result["change"] > VISIBLE


@pytest.mark.cell(ULYSSES, family="Flux", outcome="works")
def test_blocks_are_compiled_whole(ranks: list[Results]) -> None:
    for result in found(ranks, "compiled"):
        assert result["error"] < TOLERANCE and result["breaks"] == 0


def assert_refused(ranks: list[Results], case: str, kind: str, message: str) -> None:
    for result in found(ranks, case):
        assert result["type"] == kind and message in result["message"]


@pytest.mark.cell(
    RING, family="Flux", outcome="refused", note="no rank has all keys; the error names the Ulysses setting instead"
)
def test_rings_are_refused(ranks: list[Results]) -> None:
    assert_refused(ranks, "ring", "NotImplementedError", "use ContextParallelConfig(ulysses_degree=2)")


@pytest.mark.cell(ULYSSES, family="Flux", outcome="works")
@pytest.mark.parametrize(
    ("case", "kind", "message"),
    [
        ("odd heads", "ValueError", "2 ranks as many heads, but the layer has 3"),
        ("another plan", "NotImplementedError", "call enable_parallelism without cp_plan="),
        ("weights for each head", "NotImplementedError", "has weights for each head (an_bias)"),
        ("block input", "NotImplementedError", "compares the block's input"),
    ],
)
def test_what_ranks_cannot_compute_is_refused(case: str, kind: str, message: str, ranks: list[Results]) -> None:
    assert_refused(ranks, case, kind, message)
