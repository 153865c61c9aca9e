"""Settings and fixtures of every test."""

import os

# Before torch and diffusers are imported, by the tests and by the processes they start.
_processes = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
_threads = max(1, (os.cpu_count() or 1) // _processes)
os.environ["OMP_NUM_THREADS"] = str(_threads)
os.environ["DIFFUSERS_ATTN_BACKEND"] = "native"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["MPLBACKEND"] = "Agg"

import random
from collections.abc import Generator, Iterator
from typing import Any

import accelerate
import diffusers.models.attention_dispatch
import hypothesis
import numpy
import pytest
import torch
import transformers

from diffattn.measure import hardware, progress

torch.set_num_threads(_threads)
progress.EVERY = 1e9  # whether a command says how far it is would depend on how busy the machine is
hypothesis.settings.register_profile("diffattn", deadline=None, derandomize=True, max_examples=50)
hypothesis.settings.load_profile("diffattn")


def pytest_report_header() -> list[str]:
    """Processor and releases: rounding and speed depend on them, and a log may come from any machine."""
    packages = ", ".join(
        f"{module.__name__} {module.__version__}" for module in (torch, diffusers, transformers, accelerate)
    )
    return [
        f"processor: {hardware()['cpu']}, {torch.backends.cpu.get_cpu_capability()}, {os.cpu_count()} cores",
        packages,
    ]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what this machine cannot run, saying so."""
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Generator[None, Any, Any]:
    """A golden test that passes without using all that its case says fails."""
    result = yield
    if pyfuncitem.get_closest_marker("golden") is not None:
        pyfuncitem.funcargs["case"].check_used()
    return result


@pytest.fixture(autouse=True)
def seeded() -> None:
    """The same random numbers in every test, whichever ran before."""
    random.seed(0)
    numpy.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def own_attention_backend() -> Iterator[None]:
    """`set_attention_backend` of a model changes the backend of all others too, and resetting it does not undo that."""
    registry = diffusers.models.attention_dispatch._AttentionBackendRegistry
    active = registry._active_backend
    yield
    registry._active_backend = active


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """New tensors hold NaN (floats) or the largest value (integers) until written, so reading them too early shows."""
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.utils.deterministic.fill_uninitialized_memory = fill
    torch.use_deterministic_algorithms(False)
