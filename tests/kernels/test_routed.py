"""Exact tiles and means by FlexAttention: the numbers of the strips, one kernel for each shape, refusals, memory."""

import subprocess
import sys
from typing import Any

import pytest
import torch
from tolerances import assert_close
from torch import Tensor

from diffattn import HaloAttention, RoutingAttention, TokenGrid
from diffattn.kernels.flex import missing_compiler
from diffattn.kernels.routed import RoutedCall, flex, run
from diffattn.mechanisms.base import Context

needs_compiler = pytest.mark.skipif(
    missing_compiler(torch.device("cpu")) is not None, reason="FlexAttention needs a C++ compiler and AVX2"
)
CALLS: dict[str, tuple[Any, TokenGrid]] = {
    "divided": (RoutingAttention(tile=4, pool=2, top_k=3), TokenGrid(16, 12, before=5)),
    "ragged": (RoutingAttention(tile=4, pool=2, top_k=4), TokenGrid(13, 18, before=3, after=2)),
    "content": (RoutingAttention(tile=4, pool=2, top_k=4, order="content", refresh=9), TokenGrid(13, 18, before=3)),
    "centroids, weighted": (
        RoutingAttention(tile=4, pool=2, top_k=4, order="centroids", means="weighted", refresh=9),
        TokenGrid(13, 18, before=3),
    ),
    "wide queries": (RoutingAttention(tile=2, pool=2, query_tile=8, top_k=40), TokenGrid(32, 24)),
}


def call_of(name: str) -> RoutedCall:
    mechanism, grid = CALLS[name]
    call: RoutedCall = mechanism.call(*torch.randn(3, 2, 3, grid.tokens, 16), grid, None, None, None)
    return call


@pytest.mark.compile
@needs_compiler
@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("ragged", torch.float32),
        ("content", torch.bfloat16),
        ("centroids, weighted", torch.float32),
        ("wide queries", torch.float32),
    ],
)
@pytest.mark.slow
def test_the_compiled_kernel_is_the_reference(name: str, dtype: torch.dtype) -> None:
    mechanism, grid = CALLS[name]
    q, k, v = torch.randn(3, 2, 3, grid.tokens, 16).to(dtype)
    mask = torch.rand(2, 1, 1, grid.tokens) > 0.3
    mask[..., 0] = True
    memory: dict[str, Any] = {}
    context = Context(mask=mask, memory=memory)
    chosen = mechanism.choose(q, k, v, grid, context=context)
    wide = [tensor.double() for tensor in (q, k, v)]
    out = mechanism.attend(q, k, v, grid, backend="flex", context=context)
    assert_close(out, mechanism.reference(*wide, grid, context=context, chosen=chosen))


@pytest.mark.compile
@needs_compiler
@pytest.mark.slow
def test_nothing_is_compiled_after_the_first_call_of_twenty_steps_in_six_layers() -> None:
    """Every call chooses other tiles, and shares differ from layer to layer."""
    grid = TokenGrid(16, 20, before=7)
    layers = [RoutingAttention(tile=4, pool=2, top_k=2 + layer) for layer in range(6)]
    choices = set()

    def attend(mechanism: RoutingAttention) -> Tensor:
        q, k, v = torch.randn(3, 1, 2, grid.tokens, 16)
        choices.add(tuple(mechanism.choose(q, k, v, grid).flatten().tolist()))
        out = mechanism.attend(q, k, v, grid, backend="flex")
        assert_close(out, mechanism.attend(q, k, v, grid, backend="gather"))
        return out

    attend(layers[0])
    compiled = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for _ in range(20):
        for mechanism in layers:
            attend(mechanism)
    assert len(choices) == 121
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == compiled


@pytest.mark.compile
@needs_compiler
@pytest.mark.slow
def test_windows_with_means_are_compiled_too() -> None:
    mechanism = HaloAttention(tile=4, pool=2)
    grid = TokenGrid(14, 20, before=3)
    q, k, v = torch.randn(3, 1, 2, grid.tokens, 16)
    reference = mechanism.reference(q.double(), k.double(), v.double(), grid)
    assert_close(mechanism.attend(q, k, v, grid, backend="flex"), reference)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda call: call._replace(q=call.q.double()), "float64"),
        (lambda call: call._replace(q=call.q.clone().requires_grad_()), "no backward"),
        (lambda call: call._replace(q=call.q.to("meta")), "meta"),
        (lambda call: call._replace(q=call.q[:1, :1].expand(2**20, 2**10, -1, -1)), "lists of blocks"),
    ],
)
def test_what_flex_cannot_do_is_refused_and_auto_goes_on(change: Any, words: str) -> None:
    call = change(call_of("divided"))
    with pytest.raises(ValueError, match=words):
        run(call, "flex")


def test_flex_is_refused_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flex, "missing_compiler", lambda device: "there is none")
    mechanism, grid = CALLS["divided"]
    q, k, v = torch.randn(3, 1, 2, grid.tokens, 16)
    with pytest.raises(ValueError, match="there is none; can: auto, gather, dense"):
        mechanism.attend(q, k, v, grid, backend="flex")
    mechanism.attend(q, k, v, grid)


BIG = """
import resource, torch
from diffattn import RoutingAttention, TokenGrid
grid = TokenGrid(512, 512, before=512)
torch.manual_seed(0)
q, k, v = torch.randn(3, 1, 1, grid.tokens, 64)
mechanism = RoutingAttention(share=0.05, tile=16, pool=8)
with torch.no_grad():
    out = mechanism.attend(q, k, v, grid)
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    weight = (q[0, 0, 300] @ k[0, 0].T / 8).softmax(-1)  # text sees all
    assert (weight @ v[0, 0] - out[0, 0, 300]).abs().max() < 2e-5
    cells = [x[0, 0, 512:].view(32, 2, 8, 32, 2, 8, 64) for x in (k, v)]
    k_b, v_b = (x.mean((2, 5)).view(64, 64, 64) for x in cells)
    row, column = 77, 300
    tile = torch.tensor([row // 16, column // 16])
    query = q[0, 0, 512 + row * 512 + column] / 8
    from diffattn.kernels.routed import choose_tiles
    call = mechanism.call(q, k, v, grid, None, None, None)
    number = int(tile[0] * 32 + tile[1])
    one = call._replace(q=call.q[:, number : number + 1], own=call.own[number : number + 1])
    exact = choose_tiles(one)[0, 0]
    assert number in exact.tolist() and exact.unique().numel() == mechanism.exact_tiles(grid)
    seen = torch.zeros(32, 32, dtype=torch.bool)
    seen.view(-1)[exact] = True
    whole = seen.repeat_interleave(16, 0).repeat_interleave(16, 1).flatten()
    hidden = seen.repeat_interleave(2, 0).repeat_interleave(2, 1).flatten()
    keys = torch.cat([k[0, 0, :512], k[0, 0, 512:][whole], k_b.flatten(0, 1)[~hidden]])
    values = torch.cat([v[0, 0, :512], v[0, 0, 512:][whole], v_b.flatten(0, 1)[~hidden]])
    logits = query @ keys.T
    logits[-int((~hidden).sum()) :] += torch.tensor(64.0).log()
    error = (logits.softmax(-1) @ values - out[0, 0, 512 + row * 512 + column]).abs().max()
    assert error < 2e-5, error
print(used)
"""


@pytest.mark.slow
def test_an_8k_picture_fits_in_4_gigabytes() -> None:
    done = subprocess.run([sys.executable, "-c", BIG], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 4
