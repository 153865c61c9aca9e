"""Threads on one model, pipelines that share it, and deep copies: each call has its own grid and step."""

import copy
import gc
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import diffusers
import pytest
import tiny_pipelines
import torch
from hand_masks import RADIUS, error
from shared_model import SHAPES, flux_pipelines, picture, spread

import diffattn


@pytest.mark.cell("Threads on one model", family="Flux", outcome="works", note="with `steps=` and weights too")
@pytest.mark.slow
@pytest.mark.parametrize(
    ("mechanism", "options"),
    [
        (diffattn.ClearAttention(radius=1.5), {}),
        (diffattn.AgentAttention(agent_size=(2, 2), bias=True, depthwise_conv=True, window=4), {}),
        (diffattn.ClearAttention(radius=1.5), {"steps": slice(1, None)}),
        (diffattn.TokenMergeAttention(), {}),
    ],
    ids=["clear", "agent with weights", "steps=", "the block's input"],
)
def test_eight_pipelines_in_eight_threads(mechanism: Any, options: dict[str, Any]) -> None:
    """One swapped model, four shapes, two of them of equal number of tokens."""
    pipes = flux_pipelines(8)
    handle = diffattn.apply(pipes[0], mechanism, **options)
    for parameter in handle.parameters():
        torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(0))
    want = {shape: picture(pipes[0], shape, seed) for seed, shape in enumerate(SHAPES)}
    plain = flux_pipelines(1)[0]
    assert all(error(want[shape], picture(plain, shape, seed)) > 1e-3 for seed, shape in enumerate(SHAPES))
    start, wrong = threading.Barrier(8), []

    def work(number: int) -> None:
        start.wait()
        for i in range(25):
            seed = (number + i) % 4
            got = picture(pipes[number], SHAPES[seed], seed)
            if not torch.equal(got, want[SHAPES[seed]]):
                wrong.append((number, i))

    switch = sys.getswitchinterval()
    sys.setswitchinterval(2e-4)  # threads change places in the middle of things
    try:
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(work, range(8)))
    finally:
        sys.setswitchinterval(switch)
    assert not wrong


def shared(pipe: Any) -> Any:
    """A second pipeline of the same parts with a scheduler of its own."""
    parts = {**pipe.components, "scheduler": copy.deepcopy(pipe.scheduler)}
    other = type(pipe)(**parts)
    other.set_progress_bar_config(disable=True)
    return other


@pytest.mark.cell("Pipelines that share a model, `steps=`", outcome="works")
@pytest.mark.parametrize("family", ["Flux", "SD1.5", "Wan"])
def test_steps_of_a_second_pipeline_of_the_same_parts(family: str) -> None:
    case = tiny_pipelines.PIPELINES[family](steps=4)
    dense = case.run()
    with diffattn.apply(case.pipe, "clear", radius=RADIUS):
        everywhere = case.run()
    diffattn.apply(case.pipe, "clear", radius=RADIUS, steps=slice(2, None))
    want = case.run()
    spread([dense, everywhere, want])
    first, case.pipe = case.pipe, shared(case.pipe) if family != "SD1.5" else sd15_of(case.pipe)
    assert all(torch.equal(case.run(), want) for _ in range(2))
    case.pipe, second = first, case.pipe
    assert torch.equal(case.run(), want)
    del first, case.pipe  # the pipeline that was given to apply
    gc.collect()
    case.pipe = second
    assert torch.equal(case.run(), want)


def sd15_of(pipe: Any) -> Any:
    parts = {**pipe.components, "scheduler": copy.deepcopy(pipe.scheduler)}
    other = diffusers.StableDiffusionPipeline(**parts, requires_safety_checker=False)
    other.set_progress_bar_config(disable=True)
    return other


@pytest.mark.cell("Deep copies", outcome="works", note="each with steps of its own")
@pytest.mark.parametrize("family", ["Flux", "SD1.5"])
def test_steps_of_a_deep_copy(family: str) -> None:
    case = tiny_pipelines.PIPELINES[family](steps=4)
    dense = case.run()
    diffattn.apply(case.pipe, "clear", radius=RADIUS, steps=slice(2, None))
    want = case.run()
    assert error(want, dense) > 1e-3
    original = case.pipe
    case.pipe = copy.deepcopy(original)
    assert all(torch.equal(case.run(), want) for _ in range(3))
    diffattn.restore(case.pipe)
    assert torch.equal(case.run(), dense)
    case.pipe = original
    assert torch.equal(case.run(), want)
