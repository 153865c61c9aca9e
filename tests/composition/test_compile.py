"""`torch.compile`: blocks trace as a whole with a swap in place, and so do models that are read at their root."""

import functools
from collections.abc import Iterator

import pytest
import torch
from compiling import Graphs, compile_blocks
from compositions import VISIBLE
from diffusers import FlowMatchEulerDiscreteScheduler
from hand_masks import RADIUS, TOLERANCE, by_hand, error
from models import BUILDERS, Tiny
from torch import Tensor, nn

import diffattn

pytestmark = pytest.mark.compile

NEWER = ["LTX-2", "HunyuanVideo-1.5", "Wan-VACE"]
families = pytest.mark.parametrize("family", ["Flux", "SD3", "Wan", "SD1.5", *NEWER])
in_both_orders = pytest.mark.parametrize("order", ["before", "after"])


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """Nothing compiled before counts."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def references(tiny: Tiny) -> tuple[Tensor, Tensor]:
    """Output of the model as it is, and under the masks made by hand."""
    own, want = tiny.run(), by_hand(tiny, tiny.spatial)
    assert error(want, own) > VISIBLE
    return own, want


@functools.cache
def graphs_of(family: str) -> int:
    """Graphs of the unswapped blocks: one for each kind of block, or of feature map."""
    tiny, graphs = BUILDERS[family](), Graphs()
    compile_blocks(tiny.model, graphs)
    tiny.run()
    torch._dynamo.reset()
    return graphs.count


@pytest.mark.cell("torch.compile, blocks", outcome="works", note="`fullgraph=True`")
@torch.no_grad()
@families
@in_both_orders
@pytest.mark.slow
def test_blocks(family: str, order: str) -> None:
    tiny, graphs = BUILDERS[family](), Graphs()
    own, want = references(tiny)
    kinds = graphs_of(family)
    if order == "before":
        compile_blocks(tiny.model, graphs)
        assert error(tiny.run(), own) < TOLERANCE and graphs.count == kinds
        diffattn.apply(tiny.model, "clear", radius=RADIUS)
    else:
        diffattn.apply(tiny.model, "clear", radius=RADIUS)
        compile_blocks(tiny.model, graphs)
    before = graphs.count
    for _ in range(2):
        assert error(tiny.run(), want) < TOLERANCE
    assert 0 < graphs.count - before <= kinds
    diffattn.restore(tiny.model)
    assert torch.equal(tiny.run(), own)
    assert not torch._dynamo.utils.counters["graph_break"]


class Steps:
    """What `steps=` needs of a pipeline, whose loop is written out in the test."""

    def __init__(self, model: nn.Module, count: int) -> None:
        self.components = {"transformer": model}
        self.scheduler = FlowMatchEulerDiscreteScheduler()
        self.scheduler.set_timesteps(count)


@pytest.mark.cell("torch.compile, blocks, with `steps=`", outcome="works", note="no graph more than without a swap")
@torch.no_grad()
@families
def test_a_step_schedule(family: str) -> None:
    tiny, graphs = BUILDERS[family](), Graphs()
    kinds = graphs_of(family)
    pipe = Steps(tiny.model, count=4)
    calls = [{"timestep": time.expand(2)} for time in pipe.scheduler.timesteps]
    want = [tiny.run(**call) for call in calls[:2]] + [by_hand(tiny, tiny.spatial, **call) for call in calls[2:]]
    diffattn.apply(pipe, "clear", radius=RADIUS, steps=slice(2, None))
    compile_blocks(tiny.model, graphs)
    for _ in range(2):
        pipe.scheduler.set_timesteps(len(calls))
        for call, output in zip(calls, want, strict=True):
            assert error(tiny.run(**call), output) < TOLERANCE
    assert graphs.count <= kinds
    assert not torch._dynamo.utils.counters["graph_break"]


whole = pytest.mark.cell("torch.compile, whole model", outcome="works", note="`fullgraph=True`")
broken = pytest.mark.cell(
    "torch.compile, whole model",
    outcome="works",
    note="not with `fullgraph=True`: the graph breaks where the grid of each level is read",
)


branching = pytest.mark.cell(
    "torch.compile, whole model",
    outcome="works",
    note="not with `fullgraph=True`: the model itself breaks the graph, at its image's tokens",
)
BREAKS = "SD1.5", "HunyuanVideo-1.5"


@torch.no_grad()
@pytest.mark.parametrize(
    ("family", "order"),
    [
        pytest.param("Flux", "before", marks=whole),
        pytest.param("Flux", "after", marks=whole),
        pytest.param("Wan", "before", marks=whole),
        pytest.param("Wan", "after", marks=whole),
        pytest.param("SD3", "before", marks=whole),
        pytest.param("LTX-2", "after", marks=whole),
        pytest.param("Wan-VACE", "after", marks=whole),
        pytest.param("HunyuanVideo-1.5", "after", marks=branching),
        pytest.param("SD1.5", "after", marks=broken),
    ],
)
@pytest.mark.slow
def test_the_whole_model(family: str, order: str) -> None:
    tiny, graphs = BUILDERS[family](), Graphs()
    own, want = references(tiny)
    if order == "after":
        diffattn.apply(tiny.model, "clear", radius=RADIUS)
    compiled = torch.compile(tiny.model, backend=graphs, fullgraph=family not in BREAKS)
    if order == "before":
        assert error(tiny.run(compiled), own) < TOLERANCE
        diffattn.apply(compiled, "clear", radius=RADIUS)
    before = graphs.count
    for _ in range(2):
        assert error(tiny.run(compiled), want) < TOLERANCE
    assert graphs.count > before
    diffattn.restore(compiled)
    assert torch.equal(tiny.run(compiled), own)


@pytest.mark.cell("torch.compile, blocks", family="Wan", outcome="works")
@pytest.mark.slow
@torch.no_grad()
def test_inductor() -> None:
    """The compiler that users have."""
    tiny = BUILDERS["Wan"]()
    _, want = references(tiny)
    diffattn.apply(tiny.model, "clear", radius=RADIUS)
    compile_blocks(tiny.model, "inductor")
    assert error(tiny.run(), want) < TOLERANCE
