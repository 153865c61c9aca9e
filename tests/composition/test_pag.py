"""Pipelines of perturbed-attention guidance set processors of their own in every call, and take them off after it."""

import diffusers
import pytest
import tiny_pipelines
import torch
from compositions import VISIBLE
from hand_masks import RADIUS, TOLERANCE, error

import diffattn


@pytest.mark.cell("PAG pipeline", family="SD1.5", outcome="works", note="the swap goes on over its processors")
@torch.no_grad()
def test_a_pipeline_of_perturbed_attention_guidance() -> None:
    case = tiny_pipelines.sd15()
    parts = {**case.pipe.components, "requires_safety_checker": False}
    case.pipe = diffusers.StableDiffusionPAGPipeline(**parts, pag_applied_layers=["mid"])
    case.pipe.set_progress_bar_config(disable=True)
    case.call |= {"pag_scale": 4.0}
    guided = case.run()
    case.call |= {"pag_scale": 0.0}
    own = case.run()
    assert error(guided, own) > VISIBLE
    with diffattn.apply(case.pipe, "clear", radius=RADIUS):
        want = case.run()
    case.call |= {"pag_scale": 4.0}
    # as wide as the image, a window is the model's own attention
    with diffattn.apply(case.pipe, "clear", radius=100):
        for _ in range(2):
            assert error(case.run(), guided) < TOLERANCE
    with diffattn.apply(case.pipe, "clear", radius=RADIUS):
        outputs = [case.run() for _ in range(2)]
        summary = diffattn.summary(case.pipe)
        assert set(summary.calls) == {"swapped"} and all(row.calls for row in summary.rows if row.swapped)
        case.call |= {"pag_scale": 0.0}
        assert torch.equal(case.run(), want)
    assert torch.equal(*outputs)
    assert min(error(outputs[0], guided), error(outputs[0], want)) > VISIBLE
    assert torch.equal(case.run(), own)
