"""Gradient checkpointing: layers are computed a second time in the backward pass, and must find their grid again."""

import pytest
import torch
from compositions import Composition, prove
from hand_masks import gradients
from models import BUILDERS
from torch import Tensor

NO_BACKWARD = -1


class Checkpointed(Composition):
    def by_hand(self) -> Tensor:
        """Without checkpointing: masks made by hand do not reach what is computed again."""
        checkpointed = self.target.is_gradient_checkpointing
        self.off()
        want = super().by_hand()
        if checkpointed:
            self.on()
        return want


@pytest.mark.cell("Gradient checkpointing", outcome="works")
@pytest.mark.parametrize("family", ["Flux", "SD1.5", "Wan", "LTX-2", "HunyuanVideo-1.5", "Wan-VACE"])
@pytest.mark.parametrize("order", ["before", "after"])
def test_gradients(family: str, order: str, caplog: pytest.LogCaptureFixture) -> None:
    """What is compared are the gradients of all parameters."""

    def build() -> Checkpointed:
        tiny = BUILDERS[family]()
        recomputed = [0]

        def count(*_: object) -> None:
            recomputed[0] += torch._C._current_graph_task_id() != NO_BACKWARD

        for module in tiny.model.modules():
            if hasattr(module, "processor"):
                module.register_forward_pre_hook(count)

        def run() -> Tensor:
            tiny.model.train()
            return gradients(tiny.model, tiny.run())

        return Checkpointed(
            target=tiny.model,
            run=run,
            layouts=((tiny.model, tiny.spatial),),
            on=tiny.model.enable_gradient_checkpointing,
            off=tiny.model.disable_gradient_checkpointing,
            used=lambda: recomputed[0],
        )

    prove(build, order, caplog)
