"""Swapped models under `torch.compile`: whole blocks trace, and one graph serves all layers of a kind."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from compiling import Graphs, compile_blocks
from models import Tiny, flux, picture_ids, sd3, wan
from tolerances import assert_close
from torch._subclasses.fake_tensor import FakeTensorMode

import diffattn
from diffattn.swap.calls.situation import COLUMNS

pytestmark = pytest.mark.compile

EAGER_BACKENDS = ("auto", "dense", "tiled")


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """Nothing compiled before counts, and one thread is enough."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()
    torch.set_num_threads(threads)


@torch.no_grad()
@pytest.mark.parametrize(
    "backend", [name for name in EAGER_BACKENDS if name in diffattn.ClearAttention(radius=2).backends]
)
@pytest.mark.parametrize("build", [flux, wan, sd3], ids=lambda build: build.__name__)
@pytest.mark.slow
def test_compiled_blocks_equal_eager_ones(build: Callable[[], Tiny], backend: str) -> None:
    tiny = build()
    diffattn.apply(tiny.model, "clear", radius=2, backend=backend)
    want = tiny.run()
    compile_blocks(tiny.model, "eager")
    assert_close(tiny.run(), want)
    assert not torch._dynamo.utils.counters["graph_break"]


def graphs_of(tiny: Tiny, *mechanism: Any, **options: Any) -> int:
    if mechanism:
        diffattn.apply(tiny.model, *mechanism, **options)
    graphs = Graphs()
    compile_blocks(tiny.model, graphs)
    with torch.no_grad():
        for _ in range(2):
            tiny.run()
    return graphs.count


@pytest.mark.parametrize("mechanism", ["softmax", "clear"])
@pytest.mark.slow
def test_one_graph_serves_all_layers_of_a_kind(mechanism: str) -> None:
    options = {"radius": 2} if mechanism == "clear" else {}
    own = graphs_of(flux(num_layers=2, num_single_layers=4))
    torch._dynamo.reset()
    assert graphs_of(flux(num_layers=2, num_single_layers=4), mechanism, **options) == own


@torch.no_grad()
def test_compiled_blocks_follow_the_grid() -> None:
    """Another image of as many tokens: no shape tells the graph that its grid is another one."""
    tiny = flux()
    turned = {"img_ids": picture_ids(9, 6)}
    diffattn.apply(tiny.model, "clear", radius=2)
    want = [tiny.run(), tiny.run(**turned)]
    compile_blocks(tiny.model, "eager")
    for _ in range(2):
        assert_close(tiny.run(), want[0])
        assert_close(tiny.run(**turned), want[1])
    assert not torch.allclose(*want, atol=1e-3)


@torch.no_grad()
@pytest.mark.slow
def test_a_compiled_model_is_swapped_and_restored() -> None:
    tiny = flux(num_layers=1, num_single_layers=1)
    own = tiny.run()
    with diffattn.apply(tiny.model, "clear", radius=2):
        want = tiny.run()
    compiled = torch.compile(tiny.model, backend="eager")
    assert_close(tiny.run(compiled), own)
    diffattn.apply(compiled, "clear", radius=2)
    assert_close(tiny.run(compiled), want)
    diffattn.restore(compiled)
    assert_close(tiny.run(compiled), own)


def test_a_program_kept_on_disk_holds_no_constant_of_the_code() -> None:
    """Inductor finds kept programs by their graphs: what the operator's fake says must be in the graph's arguments."""
    with FakeTensorMode():
        q = torch.empty(2, 6, 1, 4)
        out, situation = torch.ops.diffattn.attend(q, q, q, None, None, [], None, torch.empty(()), COLUMNS + 1)
    assert out.shape == q.shape
    assert situation.shape == (2, COLUMNS + 1)
