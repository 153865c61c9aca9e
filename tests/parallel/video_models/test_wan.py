"""A tiny Wan on clips: a whole denoising run is the same on any number of ranks, for any split."""

from typing import Any

import diffusers
import models
import pytest
import torch
from clip_runs import SPLITS, denoise, state_of
from clip_splits import plan_of
from parallel_ranks import on_ranks
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

import diffattn
from diffattn.mechanisms.dual_scope import DualScopeAttention
from diffattn.parallel.frames import apply_on_clips
from diffattn.parallel.operations.shares import FramePlan
from diffattn.parallel.prompts import frame_prompts
from diffattn.parallel.rotary import RotaryClipAttention

FRAMES, SHAPE, TOLERANCE = 8, (2, 4, 4, 6), 1e-4
FREE = dict(local_phase=None, global_phase=None)
DUAL = DualScopeAttention(padding=2, top_k=3)
FAR = DualScopeAttention(padding=1, top_k=3, train_frames=4, **FREE)
EVERYTHING = DualScopeAttention(padding=FRAMES, top_k=0, **FREE)
MECHANISMS = {"as in training": DUAL, "longer than training": FAR, "everything": EVERYTHING}


def predictor(tiny: models.Tiny, text: Tensor | None = None) -> Any:
    text = tiny.inputs["encoder_hidden_states"] if text is None else text
    return lambda x, t: tiny.model(x, t.expand(2), text, return_dict=False)[0]


def scheduler() -> Any:
    return diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, num_train_timesteps=1000
    )


def run(mesh: DeviceMesh | None, lengths: tuple[int, ...], name: str, by_frame: bool = False) -> tuple[Tensor, bool]:
    """This rank's frames, and whether the model is itself again afterwards."""
    plan = FramePlan(lengths) if mesh is None else plan_of(mesh, lengths)
    tiny = models.wan()
    text = tiny.inputs["encoder_hidden_states"]
    prompts = frame_prompts({1: text, 6: text.flip(-1)}, range(FRAMES)) if by_frame else None
    before, state = tiny.run(), state_of(tiny.model)
    with apply_on_clips(tiny.model, plan, MECHANISMS[name]):
        out = denoise(predictor(tiny, prompts), scheduler(), plan, SHAPE, 2)
    return out, torch.equal(tiny.run(), before) and state_of(tiny.model) == state


def joined(lengths: tuple[int, ...], *settings: Any) -> Tensor:
    parts, restored = zip(*on_ranks(len(lengths), run, lengths, *settings), strict=True)
    assert all(restored)
    return torch.cat(parts, dim=2)


def unmodified() -> Tensor:
    return denoise(predictor(models.wan()), scheduler(), FramePlan((FRAMES,)), SHAPE, 2)


@pytest.mark.dist
@pytest.mark.parametrize("name", ["as in training", "longer than training"])
def test_no_split_changes_a_run(name: str) -> None:
    want, _ = run(None, (FRAMES,), name)
    assert float((want - unmodified()).abs().max()) > 100 * TOLERANCE
    for lengths in SPLITS[FRAMES]:
        torch.testing.assert_close(joined(lengths, name), want, atol=TOLERANCE, rtol=0)


@pytest.mark.dist
def test_no_split_changes_a_run_with_a_prompt_for_each_frame() -> None:
    want, _ = run(None, (FRAMES,), "as in training", True)
    assert float((want - run(None, (FRAMES,), "as in training")[0]).abs().max()) > 100 * TOLERANCE
    torch.testing.assert_close(joined((3, 4, 1), "as in training", True), want, atol=TOLERANCE, rtol=0)


@pytest.mark.dist
def test_a_window_over_everything_is_the_unmodified_model() -> None:
    want = unmodified()
    for lengths in [(FRAMES,), *SPLITS[FRAMES]]:
        torch.testing.assert_close(joined(lengths, "everything"), want, atol=TOLERANCE, rtol=0)


def test_one_rank_in_the_span_of_training_is_the_swapped_model() -> None:
    tiny = models.wan()
    with diffattn.apply(tiny.model, DUAL):
        want = tiny.run()
    with apply_on_clips(tiny.model, FramePlan((3,)), DUAL):
        assert torch.equal(tiny.run(), want)


@torch.no_grad()
def test_equal_prompts_of_the_frames_are_one_prompt() -> None:
    tiny = models.wan()
    text = tiny.inputs["encoder_hidden_states"]
    with apply_on_clips(tiny.model, FramePlan((3,)), DUAL):
        want = tiny.run()
        got = tiny.run(encoder_hidden_states=text[:, None].expand(-1, 3, -1, -1))
        torch.testing.assert_close(got, want, atol=1e-5, rtol=0)
        with pytest.raises(ValueError, match="a prompt for each of this rank's 3 frames"):
            tiny.run(encoder_hidden_states=text[:, None].expand(-1, 2, -1, -1))


def test_distances_are_compressed_beyond_the_window_alone() -> None:
    far = RotaryClipAttention(mechanism=FAR, plan=FramePlan((9,)), frequencies=(1.0, 0.1))
    assert far.compresses and not far.as_alone
    assert [far.compressed(d) for d in (-8, -1, 0, 1, 8)] == [-3, -1, 0, 1, 3]
    assert far.compressed(4) == pytest.approx(1 + 3 * 2 / 7)
    for frames, mechanism in ((4, FAR), (9, DUAL), (9, DualScopeAttention(padding=9, top_k=3, train_frames=4))):
        assert RotaryClipAttention(mechanism=mechanism, plan=FramePlan((frames,)), frequencies=(1.0,)).as_alone


def test_turned_keys_are_those_that_the_model_would_have_made_there() -> None:
    """The model's own rope, for positions 2 and 5: a key at 2 turned on by 3 frames is the key at 5."""
    tiny = models.wan()
    mechanism: Any = None
    with apply_on_clips(tiny.model, FramePlan((3,)), FAR) as handle:
        mechanism = handle.layers[0].mechanism
    cos, sin = tiny.model.rope(torch.empty(1, 4, 6, 2, 2))
    key = torch.randn(1, 1, 1, 12)

    def at(frame: int) -> Tensor:
        x, y = key.unflatten(-1, (-1, 2)).unbind(-1)
        c, s = cos[:, frame, :, ::2], sin[:, frame, :, 1::2]
        return torch.stack([x * c - y * s, x * s + y * c], dim=-1).flatten(-2)

    torch.testing.assert_close(mechanism._turned(at(2), 3.0), at(5), atol=1e-5, rtol=0)


BUNDLED = 9, (1, 8, 12, 12)
"""Latent frames of the bundled pipeline's clips, and the shape of their latents without them."""


def run_bundled(mesh: DeviceMesh | None, lengths: tuple[int, ...], mechanism: DualScopeAttention) -> Tensor:
    """This rank's latent frames of the trained pipeline, after three steps."""
    plan = FramePlan(lengths) if mesh is None else plan_of(mesh, lengths)
    model = diffusers.WanTransformer3DModel.from_pretrained(diffattn.tiny.path("wan") / "transformer").eval()
    text = torch.randn(1, 16, 64, generator=torch.Generator().manual_seed(1))
    with apply_on_clips(model, plan, mechanism):
        return denoise(lambda x, t: model(x, t.expand(1), text, return_dict=False)[0], scheduler(), plan, BUNDLED[1], 2)


@pytest.mark.dist
def test_no_split_of_the_bundled_pipeline_changes_a_run() -> None:
    want = run_bundled(None, (9,), DUAL)
    for lengths in [(5, 4), (2, 6, 1)]:
        parts = on_ranks(len(lengths), run_bundled, lengths, DUAL)
        torch.testing.assert_close(torch.cat(parts, dim=2), want, atol=TOLERANCE, rtol=0)
    everything = DualScopeAttention(padding=9, top_k=0, **FREE)
    assert float((run_bundled(None, (9,), everything) - want).abs().max()) > 100 * TOLERANCE


def refusal(mesh: DeviceMesh, lengths: tuple[int, ...], settings: dict[str, Any]) -> str:
    tiny = models.wan()
    before = state_of(tiny.model)
    try:
        apply_on_clips(
            tiny.model, FramePlan(lengths, mesh.get_local_rank(), mesh.get_group()), "dual_scope", **settings
        )
    except ValueError as error:
        assert state_of(tiny.model) == before
        return str(error)
    return "accepted"


@pytest.mark.dist
@pytest.mark.parametrize(
    ("lengths", "settings", "message"),
    [
        ((4, 4), {"mode": "official"}, "mode='official' is what the released code does with UNet3D"),
        ((4, 4), {"official": True, "clips": 2}, "official=True is what the released code does with UNet3D"),
        ((20, 13), {}, "rotary embeddings for 32 latent frames, got a video of 33"),
    ],
)
def test_what_does_not_fit_is_refused(lengths: tuple[int, ...], settings: dict[str, Any], message: str) -> None:
    for told in on_ranks(2, refusal, lengths, settings):
        assert message in told


def test_a_clip_of_another_length_is_refused() -> None:
    tiny = models.wan()
    with apply_on_clips(tiny.model, FramePlan((5,)), DUAL), pytest.raises(ValueError, match="clip of 5 frames, got 3"):
        tiny.run()
