"""ControlNets: a swap takes the model that draws, and the ControlNet beside it where `components=` names it."""

from collections.abc import Callable
from typing import Any

import diffusers
import models
import pytest
import tiny_pipelines
import torch
from compositions import VISIBLE, Composition, prove
from hand_masks import RADIUS, TOLERANCE, error, under_masks
from models import Tiny
from tiny_pipelines import TinyPipeline
from torch import Tensor

import diffattn

families = pytest.mark.parametrize("family", ["Flux", "SD1.5"])
PICTURE = torch.linspace(0, 1, 3 * 16 * 24).view(1, 3, 16, 24)


class Controlled:
    """A pipeline, and the one with a ControlNet around the same models."""

    def __init__(self, family: str) -> None:
        torch.manual_seed(0)  # Flux encodes the control image: the same VAE every time
        self.plain = tiny_pipelines.PIPELINES[family](steps=2)
        self.control: Tiny = {"Flux": models.flux_controlnet, "SD1.5": models.controlnet}[family]()
        self.tiny = self.plain
        ((self.part, self.layouts),) = self.plain.layouts.items()
        if family == "Flux":
            self.control.spatial = self.layouts
        self._class = {"Flux": diffusers.FluxControlNetPipeline, "SD1.5": diffusers.StableDiffusionControlNetPipeline}
        self._family = family

    @property
    def model(self) -> torch.nn.Module:
        return getattr(self.plain.pipe, self.part)

    def attach(self) -> None:
        pipe = self._class[self._family].from_pipe(self.plain.pipe, controlnet=self.control.model)
        argument = "control_image" if self._family == "Flux" else "image"
        self.tiny = TinyPipeline(pipe, {**self.plain.call, argument: PICTURE}, self.plain.layouts)

    def detach(self) -> None:
        self.tiny = self.plain

    def run(self) -> Tensor:
        return self.tiny.run()


@pytest.mark.cell("ControlNet, itself as it is", outcome="works")
@families
@pytest.mark.parametrize("order", ["before", "after"])
def test_the_model_alone(family: str, order: str, caplog: pytest.LogCaptureFixture) -> None:
    """`apply` before or after the pipeline with the ControlNet is made from the one without."""

    def build() -> Composition:
        case = Controlled(family)
        return Composition(
            target=case.plain.pipe,
            run=case.run,
            layouts=((case.model, case.layouts),),
            on=case.attach,
            off=case.detach,
        )

    prove(build, order, caplog)


def controlled(family: str) -> tuple[Controlled, Any]:
    case = Controlled(family)
    case.attach()
    return case, case.tiny.pipe


@pytest.mark.cell("ControlNet, swapped by components=", outcome="works")
@families
def test_the_controlnet_alone(family: str) -> None:
    case, pipe = controlled(family)
    own, want = case.run(), under_masks(case.run, (case.control.model, case.control.spatial))
    assert error(want, own) > VISIBLE
    diffattn.apply(pipe, "clear", radius=RADIUS, components=("controlnet",))
    assert error(case.run(), want) < TOLERANCE
    diffattn.restore(pipe)
    assert torch.equal(case.run(), own)


def both_at_once(case: Controlled) -> None:
    case.attach()
    diffattn.apply(case.tiny.pipe, "clear", radius=RADIUS, components=(case.part, "controlnet"))


def one_after_the_other(case: Controlled) -> None:
    diffattn.apply(case.plain.pipe, "clear", radius=RADIUS)
    case.attach()
    diffattn.apply(case.tiny.pipe, "clear", radius=RADIUS, components=("controlnet",))


@pytest.mark.cell("ControlNet, swapped by components=", outcome="works")
@families
@pytest.mark.parametrize("apply", [both_at_once, one_after_the_other], ids=lambda apply: apply.__name__)
def test_both(family: str, apply: Callable[[Controlled], None]) -> None:
    case, _ = controlled(family)
    pairs = (case.model, case.layouts), (case.control.model, case.control.spatial)
    own, want, model_alone = case.run(), under_masks(case.run, *pairs), under_masks(case.run, pairs[0])
    assert error(want, own) > VISIBLE and error(want, model_alone) > VISIBLE
    case = Controlled(family)
    apply(case)
    assert error(case.run(), want) < TOLERANCE
    diffattn.restore(case.tiny.pipe)
    assert torch.equal(case.run(), own)


@pytest.mark.cell("Several ControlNets, swapped by components=", outcome="works")
@families
def test_several(family: str) -> None:
    case = Controlled(family)
    case.control.model = [models.BUILDERS[f"{'SD' if family == 'SD1.5' else family}-ControlNet"]().model for _ in "ab"]
    case.attach()
    pipe = case.tiny.pipe
    case.tiny.call |= {name: [PICTURE, 1 - PICTURE] for name in case.tiny.call if name in ("image", "control_image")}
    case.tiny.call["controlnet_conditioning_scale"] = [1.0, 0.5]
    own = case.run()
    want = under_masks(case.run, *((net, Controlled(family).control.spatial) for net in pipe.controlnet.nets))
    assert error(want, own) > VISIBLE
    for target, components in ((pipe, ("controlnet",)), (pipe.controlnet, None)):
        handle = diffattn.apply(target, "clear", radius=RADIUS, components=components)
        assert error(case.run(), want) < TOLERANCE
        counts = {id(net): sum(row.swapped for row in diffattn.summary(net).rows) for net in pipe.controlnet.nets}
        assert len(handle.layers) == sum(counts.values()) and all(counts.values())
        assert sum(row.swapped for row in diffattn.summary(target).rows) == len(handle.layers)
        diffattn.restore(target)
        assert torch.equal(case.run(), own)
    with diffattn.apply(pipe, "clear", radius=RADIUS, components=(case.part, "controlnet")):
        assert error(case.run(), want) > VISIBLE
    assert torch.equal(case.run(), own)
