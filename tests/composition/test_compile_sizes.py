"""`torch.compile` and `torch.export` of a swapped model: many sizes, training, threads, LoRAs that change."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from compiling import Graphs, compile_blocks
from hand_masks import RADIUS, TOLERANCE, error
from models import BUILDERS, Tiny, draw, flux, picture_ids
from torch import Tensor

import diffattn
from diffattn.swap.calls import frames

pytestmark = pytest.mark.compile

SIZES = [(4, 4), (4, 6), (6, 4), (3, 8), (5, 7), (7, 5), (2, 9), (8, 8), (9, 3), (6, 6), (10, 4), (4, 10)]
"""Rows and columns of tokens: more sizes than torch compiles of one function by itself, some of equal number."""


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """Nothing compiled before counts."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def sized(tiny: Tiny, rows: int, columns: int) -> dict[str, Any]:
    hidden_states = torch.randn(2, rows * columns, 4, generator=torch.Generator().manual_seed(rows))
    return {"hidden_states": hidden_states, "img_ids": picture_ids(rows, columns)}


def outputs(tiny: Tiny, model: Any = None) -> list[Tensor]:
    return [tiny.run(model, **sized(tiny, *size)) for size in SIZES]


def graphs_unswapped(whole: bool) -> int:
    tiny, graphs = flux(), Graphs()
    if whole:
        outputs(tiny, torch.compile(tiny.model, backend=graphs, fullgraph=True))
    else:
        compile_blocks(tiny.model, graphs)
        outputs(tiny)
    torch._dynamo.reset()
    return graphs.count


MECHANISMS: dict[str, dict[str, Any]] = {
    "softmax": {},
    "linear": {},
    "agent": {"num_agents": 4},
    "clear": {"radius": RADIUS},
    "halo": {"tile": 2},
    "token_merge": {},
}


@pytest.mark.cell("torch.compile, many sizes", family="Flux", outcome="works", note="no graph more than without a swap")
@torch.no_grad()
@pytest.mark.parametrize("mechanism", MECHANISMS)
@pytest.mark.slow
def test_blocks_at_many_sizes(mechanism: str) -> None:
    tiny, graphs = flux(), Graphs()
    wanted_graphs = graphs_unswapped(whole=False)
    diffattn.apply(tiny.model, mechanism, **MECHANISMS[mechanism])
    want = outputs(tiny)
    compile_blocks(tiny.model, graphs)
    for _ in range(2):
        for got, one in zip(outputs(tiny), want, strict=True):
            assert error(got, one) < TOLERANCE
    assert graphs.count <= wanted_graphs
    assert not torch._dynamo.utils.counters["graph_break"]


@pytest.mark.cell("torch.compile, many sizes", family="Flux", outcome="works")
@torch.no_grad()
@pytest.mark.slow
def test_a_whole_model_at_many_sizes() -> None:
    tiny, graphs = flux(), Graphs()
    wanted_graphs = graphs_unswapped(whole=True)
    diffattn.apply(tiny.model, "clear", radius=RADIUS)
    want = outputs(tiny)
    compiled = torch.compile(tiny.model, backend=graphs, fullgraph=True)
    for got, one in zip(outputs(tiny, compiled), want, strict=True):
        assert error(got, one) < TOLERANCE
    assert graphs.count <= wanted_graphs


def video_sized(family: str, rows: int, columns: int) -> dict[str, Any]:
    """A call of another size."""
    if family == "LTX-2":
        return {
            "hidden_states": draw(2, 3 * rows * columns, 4),
            "height": rows,
            "width": columns,
            "video_coords": None,
        }
    control = {"control_hidden_states": draw(2, 6, 3, 2 * rows, 2 * columns)} if family == "Wan-VACE" else {}
    return {"hidden_states": draw(2, 4, 3, 2 * rows, 2 * columns), **control}


@pytest.mark.cell("torch.compile, many sizes", outcome="works", note="no graph more than without a swap")
@torch.no_grad()
@pytest.mark.parametrize("family", ["LTX-2", "HunyuanVideo-1.5", "Wan-VACE"])
@pytest.mark.slow
def test_blocks_of_video_models_at_many_sizes(family: str) -> None:
    """Padded text among them, whose mask is one over queries and keys."""
    tiny, calls = BUILDERS[family](), [video_sized(family, *size) for size in SIZES[:4]]

    def outputs_of_all() -> list[Tensor]:
        return [tiny.run(**call) for call in calls]

    plain = Graphs()
    compile_blocks(tiny.model, plain)
    outputs_of_all()
    torch._dynamo.reset()
    tiny, graphs = BUILDERS[family](), Graphs()
    diffattn.apply(tiny.model, "clear", radius=RADIUS)
    want = outputs_of_all()
    compile_blocks(tiny.model, graphs)
    for _ in range(2):
        for got, one in zip(outputs_of_all(), want, strict=True):
            assert error(got, one) < TOLERANCE
    assert graphs.count <= plain.count
    assert not torch._dynamo.utils.counters["graph_break"]


@pytest.mark.cell("torch.compile, many sizes", family="Flux", outcome="works")
@torch.no_grad()
def test_dynamic_shapes_are_never_compiled_anew() -> None:
    """As diffusers' own test has it: one graph, and an error where it would take another."""
    tiny = flux()
    diffattn.apply(tiny.model, "clear", radius=RADIUS)
    want = outputs(tiny)
    compiled = torch.compile(tiny.model, backend="eager", fullgraph=True, dynamic=True)
    tiny.run(compiled, **sized(tiny, *SIZES[0]))
    with torch._dynamo.config.patch(error_on_recompile=True):
        for got, one in zip(outputs(tiny, compiled), want, strict=True):
            assert error(got, one) < TOLERANCE


@pytest.mark.cell("torch.compile, in threads", family="Flux", outcome="works")
@pytest.mark.slow
def test_threads_of_a_compiled_model() -> None:
    tiny = flux()
    diffattn.apply(tiny.model, "clear", radius=RADIUS)
    with torch.no_grad():
        want = outputs(tiny)
        compile_blocks(tiny.model, "eager")
        outputs(tiny)

    def run(number: int) -> float:
        with torch.no_grad():
            i = number % len(SIZES)
            return float(error(tiny.run(**sized(tiny, *SIZES[i])), want[i]))

    with ThreadPoolExecutor(4) as pool:
        assert max(pool.map(run, range(48))) < TOLERANCE


WITH_WEIGHTS = {
    "clear": diffattn.ClearAttention(radius=RADIUS, down_factor=2),
    "agent": diffattn.AgentAttention(agent_size=(2, 2), bias=True, depthwise_conv=True, window=4),
}


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # dynamo's own
@pytest.mark.cell("torch.compile, gradients", family="Flux", outcome="works", note="at the cost of a second forward")
@pytest.mark.parametrize(
    ("name", "backend"),
    [
        ("clear", "aot_eager"),
        ("agent", "aot_eager"),
        pytest.param("agent", "inductor", marks=pytest.mark.slow),
    ],
)
def test_gradients_at_several_sizes(name: str, backend: str) -> None:
    """Inductor, which compiles for most of a minute, takes one kind of block."""
    tiny = flux(num_layers=0 if backend == "inductor" else 1, num_single_layers=1)
    mechanism = WITH_WEIGHTS[name]
    handle = diffattn.apply(tiny.model, mechanism)
    for parameter in handle.parameters():
        torch.nn.init.normal_(parameter)

    def gradients() -> list[Tensor]:
        trained = [*tiny.model.parameters(), *handle.parameters()]
        for parameter in trained:
            parameter.grad = None
        for size in [(4, 6), (8, 4)]:
            tiny.model.train()
            tiny.model(**{**tiny.inputs, **sized(tiny, *size)}, return_dict=False)[0].square().mean().backward()
        return [parameter.grad.clone() for parameter in trained if parameter.grad is not None]

    want = gradients()
    compile_blocks(tiny.model, backend)
    got = gradients()
    assert len(got) == len(want)
    for one, other in zip(got, want, strict=True):
        assert torch.allclose(one, other, atol=1e-5 * float(other.abs().max()) + 1e-7, rtol=1e-3)


LORA = {"r": 2, "lora_alpha": 2, "target_modules": ["to_q", "to_v"], "init_lora_weights": False}


@pytest.mark.cell("torch.compile, LoRA hot-swap", outcome="works", note="compiles nothing anew")
@torch.no_grad()
@pytest.mark.parametrize("family", ["Flux", "Qwen-Image"])
@pytest.mark.parametrize("mechanism", ["softmax", "clear"])
def test_lora_hot_swap(family: str, mechanism: str, tmp_path: Path) -> None:
    from peft import LoraConfig

    folders = [tmp_path / "0", tmp_path / "1"]
    for seed, folder in enumerate(folders):
        torch.manual_seed(seed)
        tiny = BUILDERS[family]()
        tiny.model.add_adapter(LoraConfig(**LORA), "own")
        tiny.model.save_lora_adapter(folder, adapter_name="own")

    file = {"weight_name": "pytorch_lora_weights.safetensors", "prefix": None, "adapter_name": "own"}

    def swapped() -> Tiny:
        tiny = BUILDERS[family]()
        diffattn.apply(tiny.model, mechanism, **MECHANISMS[mechanism])
        return tiny

    want = []
    for folder in folders:
        tiny = swapped()
        tiny.model.load_lora_adapter(folder, **file)
        want.append(tiny.run())
    assert error(want[0], want[1]) > 1e-3
    tiny = swapped()
    tiny.model.enable_lora_hotswap(target_rank=2)
    tiny.model.load_lora_adapter(folders[0], **file)
    compiled = torch.compile(tiny.model, backend="eager", fullgraph=True)
    assert error(tiny.run(compiled), want[0]) < TOLERANCE
    with torch._dynamo.config.patch(error_on_recompile=True):
        tiny.model.load_lora_adapter(folders[1], **file, hotswap=True)
        assert error(tiny.run(compiled), want[1]) < TOLERANCE


one_size = pytest.mark.cell("torch.export", outcome="works", note="a program of a window is for one size")
EXPORTED = [
    pytest.param("Flux", "softmax", marks=pytest.mark.cell("torch.export", outcome="works")),
    pytest.param("Flux", "clear", marks=pytest.mark.cell("torch.export", outcome="works")),
    *(pytest.param(family, "clear", marks=one_size) for family in ("SD3", "Wan", "Qwen-Image")),
]


@torch.no_grad()
@pytest.mark.parametrize(("family", "mechanism"), EXPORTED)
def test_export(family: str, mechanism: str) -> None:
    tiny = BUILDERS[family]()
    diffattn.apply(tiny.model, mechanism, **MECHANISMS[mechanism])
    want = tiny.run()
    inputs = {**tiny.inputs, "return_dict": False}
    program = torch.export.export(tiny.model, (), inputs, strict=False)
    got = program.module()(**inputs)[0]
    assert error(got.flatten(), want) < TOLERANCE


@pytest.mark.cell("torch.export", family="Flux", outcome="works", note="needs diffattn where it runs")
@torch.no_grad()
def test_an_exported_program_reads_the_ids_of_each_call(tmp_path: Path) -> None:
    """Two shapes of as many tokens, from a file."""
    tiny = flux()
    diffattn.apply(tiny.model, "clear", radius=RADIUS)
    inputs = [{**tiny.inputs, **sized(tiny, *size), "return_dict": False} for size in [(4, 6), (3, 8)]]
    want = [tiny.run(**sized(tiny, *size)) for size in [(4, 6), (3, 8)]]
    torch.export.save(torch.export.export(tiny.model, (), inputs[0], strict=False), tmp_path / "flux.pt2")
    program = torch.export.load(tmp_path / "flux.pt2").module()
    for call, one in zip(inputs, want, strict=True):
        assert error(program(**call)[0].flatten(), one) < TOLERANCE


@pytest.mark.cell("torch.export", family="Flux", outcome="works")
@torch.no_grad()
def test_an_export_that_needs_values_says_so() -> None:
    tiny = flux()
    diffattn.apply(tiny.model, "token_merge")
    with pytest.raises(Exception, match="read from the values of img_ids, and torch.export traces without"):
        torch.export.export(tiny.model, (), {**tiny.inputs, "return_dict": False}, strict=False)
    assert frames._frames.get() == ()
