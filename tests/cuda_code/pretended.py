"""A pretended GPU: Dynamo and Inductor write CUDA code on a machine without one, by the CPU build of torch.

Nothing is launched. What a driver or the CUDA build would be asked is answered here, and the source of the module that
Inductor would load is taken away before it does. Private names of torch 2.13 and 2.14 are replaced: where a release
moves one, `pretend` fails with that name.
"""

import contextlib
import importlib
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch._subclasses import FakeTensorMode
from torch.utils import _pytree as pytree

from .cards import CARDS, Card


class Written(NamedTuple):
    """A module that Inductor wrote."""

    source: str
    inputs: tuple[str, ...]
    """Names of the graph's inputs, in the order of the module's arguments."""


class DoneError(Exception):
    """The source is written."""


@contextlib.contextmanager
def pretend(name: str) -> Iterator[None]:
    """Meanwhile torch and Triton believe in one such GPU."""
    card = CARDS[name]
    with contextlib.ExitStack() as stack:
        for patch in (*_of_torch(card), *_of_inductor(), *_of_interfaces(card)):
            stack.enter_context(patch)
        stack.enter_context(_driver(card))
        for asked in ("has_triton", "has_triton_package"):
            getattr(getattr(torch.utils._triton, asked), "cache_clear", lambda: None)()
        yield


def _of_torch(card: Card) -> list[Any]:
    """What is asked through torch.cuda."""
    properties = _properties(card)
    values: dict[str, Any] = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "_lazy_init": lambda: None,
        "set_device": lambda device: None,
        "synchronize": lambda *args: None,
        "get_device_properties": lambda *args, **kwargs: properties,
        "get_device_capability": lambda *args, **kwargs: card.capability,
        "get_device_name": lambda *args, **kwargs: card.name,
        "_exchange_device": lambda device: 0,
        "_maybe_exchange_device": lambda device: 0,
        "get_rng_state": lambda *args, **kwargs: torch.get_rng_state(),
        "set_rng_state": lambda *args, **kwargs: None,
        "is_current_stream_capturing": lambda *args, **kwargs: False,
        "get_arch_list": lambda: ["sm_{}{}".format(*card.capability)],
    }
    patches = [mock.patch.object(torch.cuda, name, value) for name, value in values.items()]
    patches.append(mock.patch.object(torch.accelerator, "is_available", lambda *args, **kwargs: False))
    patches.append(mock.patch.object(torch.version, "cuda", torch.version.cuda or "13.0"))
    return patches


def _of_inductor() -> list[Any]:
    """What would trace real CUDA tensors, or ask a driver for a device guard."""
    importlib.import_module("torch._higher_order_ops.flex_attention")
    operators = sys.modules["torch._higher_order_ops.flex_attention"]
    fill_order: Callable[..., Any] = importlib.import_module("torch._inductor.ir").get_fill_order
    config = importlib.import_module("torch._inductor.config")

    def permute_strides(out: torch.Tensor, like: tuple[int, ...]) -> torch.Tensor:
        strides = operators._construct_strides(out.shape, fill_order(like))
        return out.new_empty_strided(out.shape, strides)

    passes = [importlib.import_module(f"torch._inductor.fx_passes.{name}") for name in ("joint_graph", "post_grad")]
    return [
        mock.patch.object(operators, "_permute_strides", permute_strides),
        config.patch({"joint_graph_constant_folding": False, "compile_threads": 1, "fx_graph_cache": False}),
        *(mock.patch.object(module, "lazy_init", lambda *args, **kwargs: None) for module in passes),
    ]


def _of_interfaces(card: Card) -> list[Any]:
    """What Dynamo's interface to devices says."""
    cuda = importlib.import_module("torch._dynamo.device_interface").CudaInterface
    major, minor = card.capability
    properties = _properties(card)
    values = {
        "is_available": lambda: True,
        "current_device": lambda: 0,
        "get_device_properties": lambda *args, **kwargs: properties,
        "get_compute_capability": lambda *args, **kwargs: major * 10 + minor,
        "get_raw_stream": lambda *args: 0,
        "is_triton_capable": lambda *args, **kwargs: True,
        "raise_if_triton_unavailable": lambda *args, **kwargs: None,
    }
    of_worker = {name: values[name] for name in ("get_device_properties", "current_device")}
    return [
        mock.patch.object(owner, name, staticmethod(value))
        for owner, found in ((cuda, values), (cuda.Worker, of_worker))
        for name, value in found.items()
    ]


def _properties(card: Card) -> types.SimpleNamespace:
    major, minor = card.capability
    return types.SimpleNamespace(
        name=card.name,
        major=major,
        minor=minor,
        total_memory=card.gibibytes * 2**30,
        multi_processor_count=card.processors,
        regs_per_multiprocessor=65536,
        max_threads_per_multi_processor=card.threads,
        max_threads_per_block=1024,
        warp_size=32,
        shared_memory_per_block=49152,
        shared_memory_per_block_optin=card.shared,
        shared_memory_per_multiprocessor=card.shared + 1024,
        L2_cache_size=50 * 2**20,
        is_integrated=0,
        is_multi_gpu_board=0,
        uuid="",
        gcnArchName="",
    )


@contextlib.contextmanager
def _driver(card: Card) -> Iterator[None]:
    """Triton's."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime.driver import driver

    major, minor = card.capability
    limits = {
        "max_shared_mem": card.shared,
        "multiprocessor_count": card.processors,
        "max_num_regs": 65536,
        "warpSize": 32,
    }
    found = types.SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", major * 10 + minor, 32),
        get_current_device=lambda: 0,
        get_current_stream=lambda device=None: 0,
        get_active_torch_device=lambda: torch.device("cuda", 0),
        get_device_interface=lambda: torch.cuda,
        is_active=lambda: True,
        utils=types.SimpleNamespace(get_device_properties=lambda device: limits),
        launcher_cls=None,
        map_python_to_cpp_type=lambda kind: kind,
    )
    before = driver._active
    driver.set_active(found)
    try:
        yield
    finally:
        driver._active = before


@contextlib.contextmanager
def capture(found: list[Written]) -> Iterator[None]:
    """Meanwhile Inductor's modules are taken as source; what would run them ends."""
    from torch._inductor import compile_fx
    from torch._inductor.graph import GraphLowering

    names: list[tuple[str, ...]] = []
    compile_graph = compile_fx.compile_fx

    def noting(graph: torch.fx.GraphModule, *args: Any, **kwargs: Any) -> Any:
        if isinstance(graph, torch.fx.GraphModule):
            names.append(tuple(node.name for node in graph.graph.nodes if node.op == "placeholder"))
        return compile_graph(graph, *args, **kwargs)

    def take(self: GraphLowering) -> None:
        code = self.codegen_with_cpp_wrapper() if self.cpp_wrapper else self.codegen()
        source = getattr(code[0], "value", code[0])
        found.append(Written(source, names[-1] if names else tuple(self.graph_input_names)))
        raise DoneError

    with (
        mock.patch.object(GraphLowering, "compile_to_module", take),
        mock.patch.object(compile_fx, "compile_fx", noting),
    ):
        before = len(found)
        try:
            yield
        except Exception as error:
            if len(found) == before or not _is_done(error):
                raise


def _is_done(error: BaseException | None) -> bool:
    """Was it raised for a source, by torch's wrappers too?"""
    inner = getattr(error, "inner_exception", None)
    return error is not None and (isinstance(error, DoneError) or _is_done(inner) or _is_done(error.__cause__))


@contextlib.contextmanager
def fake_tensors() -> Iterator[None]:
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield


def as_cuda(nested: Any) -> Any:
    """Tensors in tuples and the like as fake CUDA tensors of the same layout; inside `fake_tensors`."""

    def fake(tensor: torch.Tensor) -> torch.Tensor:
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cuda")

    return pytree.tree_map_only(torch.Tensor, fake, nested)
