"""A tiny UNet3D on clips: a whole denoising run, with noise in every step, is the same for any split."""

import diffusers
import models
import pytest
import torch
from clip_runs import SPLITS, denoise
from clip_splits import plan_of
from parallel_ranks import on_ranks
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from diffattn.mechanisms.dual_scope import DualScopeAttention
from diffattn.parallel.frames import apply_on_clips
from diffattn.parallel.operations.shares import FramePlan

FRAMES, SHAPE, TOLERANCE = 8, (1, 4, 4, 6), 1e-4
MECHANISMS = {
    "dual": DualScopeAttention(padding=2, top_k=3),
    "everything": DualScopeAttention(padding=FRAMES, top_k=0, local_phase=None, global_phase=None),
}


def unet3d() -> models.Tiny:
    tiny = models.unet3d()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in tiny.model.named_parameters():
            if "conv4" in name:  # made of zeros, which would hide the convolutions
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return tiny


def run(mesh: DeviceMesh | None, lengths: tuple[int, ...], name: str | None) -> Tensor:
    """This rank's frames; None: of the unmodified model."""
    plan = FramePlan(lengths) if mesh is None else plan_of(mesh, lengths)
    tiny = unet3d()
    text = tiny.inputs["encoder_hidden_states"][:1]

    def predict(x: Tensor, t: Tensor) -> Tensor:
        return tiny.model(x, t, text, return_dict=False)[0]

    scheduler = diffusers.DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++", prediction_type="sample")
    if name is None:
        return denoise(predict, scheduler, plan, SHAPE, 2, "variance_noise")
    with apply_on_clips(tiny.model, plan, MECHANISMS[name]):
        return denoise(predict, scheduler, plan, SHAPE, 2, "variance_noise")


# diffusers' solver converts a tensor in a way that numpy 2 deprecates
@pytest.mark.dist
@pytest.mark.parametrize("name", MECHANISMS)
@pytest.mark.slow
def test_no_split_changes_a_run(name: str) -> None:
    want = run(None, (FRAMES,), None if name == "everything" else name)
    for lengths in SPLITS[FRAMES]:
        got = torch.cat(on_ranks(len(lengths), run, lengths, name), dim=2)
        torch.testing.assert_close(got, want, atol=TOLERANCE, rtol=0)
