"""Offloading: a swap stays right call after call, and taking it back leaves the offload in place.

The hooks are the same from the CPU to the CPU, hung, dropped and hung again at the end of every call: everything runs
here but the move to an accelerator. Sequential offload keeps a layer's weights on the meta device until its turn, so it
is seen to work here, too.
"""

from collections.abc import Callable
from typing import Any

import accelerate
import pytest
import torch
from accelerate.hooks import AlignDevicesHook, CpuOffload
from compositions import Composition, prove
from diffusers.hooks import HookRegistry
from diffusers.hooks.group_offloading import ModuleGroup
from tiny_pipelines import PIPELINES, TinyPipeline

CPU = torch.device("cpu")
ACCELERATOR = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None

in_both_orders = pytest.mark.parametrize("order", ["before", "after"])
families = pytest.mark.parametrize("family", ["Flux", "Wan", "SD1.5"])
devices = pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param(
            ACCELERATOR and ACCELERATOR.type,
            marks=pytest.mark.skipif(ACCELERATOR is None, reason="needs an accelerator to load the weights onto"),
            id="accelerator",
        ),
    ],
)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Callable[[type, str], list[Any]]:
    """Notes the objects on which a method is called from now on."""

    def count(cls: type, method: str) -> list[Any]:
        calls: list[Any] = []
        original = getattr(cls, method)

        def noted(self: Any, *args: Any, **kwargs: Any) -> Any:
            calls.append(self)
            return original(self, *args, **kwargs)

        monkeypatch.setattr(cls, method, noted)
        return calls

    return count


def weights_on(case: TinyPipeline) -> set[str]:
    """Kinds of devices that hold the weights of the models in question."""
    return {parameter.device.type for model in case.models for parameter in model.parameters()}


@pytest.mark.cell("Group offload", outcome="works", note="blocks and single layers")
@families
@in_both_orders
@pytest.mark.parametrize("kind", ["block_level", "leaf_level"])
def test_group_offload(
    family: str, order: str, kind: str, counted: Callable[..., list[Any]], caplog: pytest.LogCaptureFixture
) -> None:
    moved = counted(ModuleGroup, "onload_")

    def build() -> Composition:
        case = PIPELINES[family](steps=2)

        def on() -> None:
            for model in case.models:
                model.enable_group_offload(CPU, CPU, offload_type=kind, num_blocks_per_group=1)

        def off() -> None:
            for model in case.models:
                HookRegistry.check_if_exists_or_initialize(model).remove_hook("group_offloading", recurse=True)

        return case.composition(on, off, used=lambda: len(moved))

    prove(build, order, caplog)


@pytest.mark.cell("Sequential CPU offload", outcome="works")
@families
@in_both_orders
@devices
def test_sequential_cpu_offload(
    family: str, order: str, device: str, counted: Callable[..., list[Any]], caplog: pytest.LogCaptureFixture
) -> None:
    moved = counted(AlignDevicesHook, "pre_forward")

    def build() -> Composition:
        case = PIPELINES[family](steps=2)

        def on() -> None:
            if device == "cpu":
                # as the pipeline does, which names the device cpu:0: for accelerate another one than cpu
                for part in case.pipe.components.values():
                    if isinstance(part, torch.nn.Module):
                        accelerate.cpu_offload(part, CPU, offload_buffers=len(part._parameters) > 0)
            else:
                case.pipe.enable_sequential_cpu_offload(device=device)

        def used() -> int:
            assert weights_on(case) == {"meta"}
            return sum(hook.offload for hook in moved)

        return case.composition(on, case.pipe.remove_all_hooks, used=used)

    prove(build, order, caplog)


@pytest.mark.cell("Model CPU offload", outcome="works")
@families
@in_both_orders
@devices
def test_model_cpu_offload(
    family: str, order: str, device: str, counted: Callable[..., list[Any]], caplog: pytest.LogCaptureFixture
) -> None:
    moved = counted(CpuOffload, "pre_forward")

    def build() -> Composition:
        case = PIPELINES[family](steps=2)

        def used() -> int:
            assert weights_on(case) == {"cpu"}
            return len(moved)

        return case.composition(
            on=lambda: case.pipe.enable_model_cpu_offload(device=device), off=case.pipe.remove_all_hooks, used=used
        )

    prove(build, order, caplog)
