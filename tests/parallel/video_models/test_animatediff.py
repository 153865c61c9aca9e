"""A tiny AnimateDiff on clips: a whole denoising run is the same on any number of ranks, for any split."""

from typing import Any

import diffusers
import models
import pytest
import torch
from clip_runs import SPLITS, denoise, state_of
from clip_splits import plan_of
from parallel_ranks import on_ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from diffattn.mechanisms.dual_scope import DualScopeAttention
from diffattn.mechanisms.softmax import softmax_reference
from diffattn.parallel.frames import apply_on_clips
from diffattn.parallel.operations.shares import FramePlan
from diffattn.parallel.prompts import frame_prompts
from diffattn.parallel.video_models.animatediff import chunks

SHAPE, TOLERANCE, ROWS = (1, 4, 4, 6), 1e-4, 32
FREE = dict(local_phase=None, global_phase=None)
MECHANISMS = {
    "dual": DualScopeAttention(padding=2, top_k=3),
    "long": DualScopeAttention(padding=5, top_k=4),
    "everything": DualScopeAttention(padding=8, top_k=0, **FREE),
}


def animatediff() -> models.Tiny:
    """With 32 positions, as released, and a network that grows the differences of frames."""
    tiny = models.animatediff()
    config = {**tiny.model.config, "motion_max_seq_length": ROWS}
    with torch.random.fork_rng():
        tiny.model = models.randomize(diffusers.UNetMotionModel.from_config(config))
    return tiny


def predictor(model: nn.Module, text: Tensor, plan: FramePlan, by_frame: bool = False) -> Any:
    """The text is repeated for every frame, as its pipeline does, or one for each frame of the video."""
    prompts = frame_prompts({1: text, plan.frames - 2: text.flip(-1)}, range(plan.frames)) if by_frame else None
    states = text.repeat_interleave(plan.length, 0) if prompts is None else prompts
    return lambda x, t: model(x, t, states, return_dict=False)[0]


def run(
    mesh: DeviceMesh | None, lengths: tuple[int, ...], name: str | None, by_frame: bool = False
) -> tuple[Tensor, bool]:
    """This rank's frames, and whether the model is itself again afterwards; None: of the unmodified model."""
    plan = FramePlan(lengths) if mesh is None else plan_of(mesh, lengths)
    tiny = animatediff()
    predict = predictor(tiny.model, tiny.inputs["encoder_hidden_states"][:1], plan, by_frame)
    if name is None:
        return denoise(predict, diffusers.DDIMScheduler(), plan, SHAPE, 2), True
    before, state, names = tiny.run(), state_of(tiny.model), set(tiny.model.state_dict())
    with apply_on_clips(tiny.model, plan, MECHANISMS[name]):
        assert set(tiny.model.state_dict()) == names
        out = denoise(predict, diffusers.DDIMScheduler(), plan, SHAPE, 2)
    return out, torch.equal(tiny.run(), before) and state_of(tiny.model) == state


def joined(lengths: tuple[int, ...], *settings: Any) -> Tensor:
    parts, restored = zip(*on_ranks(len(lengths), run, lengths, *settings), strict=True)
    assert all(restored)
    return torch.cat(parts, dim=2)


@pytest.mark.dist
@pytest.mark.parametrize("by_frame", [False, True], ids=["one prompt", "a prompt for each frame"])
def test_no_split_changes_a_run(by_frame: bool) -> None:
    want, _ = run(None, (8,), "dual", by_frame)
    for lengths in SPLITS[8][:2] if by_frame else SPLITS[8]:
        torch.testing.assert_close(joined(lengths, "dual", by_frame), want, atol=TOLERANCE, rtol=0)


@pytest.mark.dist
def test_a_video_longer_than_the_positions_does_not_depend_on_the_split() -> None:
    want, _ = run(None, (48,), "long")
    assert want.isfinite().all()
    for lengths in SPLITS[48]:
        torch.testing.assert_close(joined(lengths, "long"), want, atol=TOLERANCE, rtol=0)


@pytest.mark.dist
def test_a_window_over_everything_is_the_unmodified_model() -> None:
    want, _ = run(None, (8,), None)
    assert float((want - run(None, (8,), "dual")[0]).abs().max()) > 100 * TOLERANCE
    for lengths in [(8,), *SPLITS[8]]:
        torch.testing.assert_close(joined(lengths, "everything"), want, atol=TOLERANCE, rtol=0)


def test_chunks_are_cut_from_the_start_of_the_video() -> None:
    for frames, padding in ((48, 5), (40, 8), (33, 15), (100, 0)):
        parts = list(chunks(frames, padding, ROWS))
        assert [frame for chunk in parts for frame in chunk.queries] == list(range(frames))
        for chunk in parts:
            assert len(chunk.keys) <= ROWS
            near = {frame for query in chunk.queries for frame in range(query - padding, query + padding + 1)}
            assert set(chunk.keys) == near & set(range(frames))
    assert [chunk.queries for chunk in chunks(32, 31, ROWS)] == [range(32)]


@torch.no_grad()
def test_the_layers_of_a_long_video_are_those_of_the_formula() -> None:
    """One layer, frame by frame: rows added before the projections, chunks of 22 frames with a window of 5."""
    tiny, frames, padding, top_k = animatediff(), 48, 5, 4
    plan, mechanism = FramePlan((frames,)), DualScopeAttention(padding=padding, top_k=top_k, **FREE)
    x = torch.randn(3, frames, 8)
    with apply_on_clips(tiny.model, plan, mechanism):
        module = tiny.model.down_blocks[0].motion_modules[0]
        block = module.transformer_blocks[0]
        attn, rows = block.attn1, block.pos_embed.pe[0]
        assert torch.equal(block.pos_embed(x), x)
        outputs: list[Tensor] = []
        # inside the forward that tells the layers their grid
        hook = block.norm1.register_forward_pre_hook(lambda *_: outputs.append(attn(x)))
        module(torch.randn(frames, 8, 1, 3), num_frames=frames)
        hook.remove()
        got = outputs[0]

    def project(layer: nn.Module, y: Tensor) -> Tensor:
        return layer(y).unflatten(-1, (attn.heads, -1)).transpose(1, 2)

    want = torch.zeros_like(x)
    size = ROWS - 2 * padding
    shared = [g * frames // top_k for g in range(top_k)]
    for frame in range(frames):
        start = max(frame // size * size - padding, 0)
        near = [f for f in range(frames) if abs(f - frame) <= padding]
        far = [g for g in shared if g not in near]
        seen = torch.cat(
            [x[:, near] + rows[[f - start for f in near]], x[:, far] + rows[[g * ROWS // frames for g in far]]], 1
        )
        query = project(attn.to_q, x[:, [frame]] + rows[frame - start])
        out = softmax_reference(query, project(attn.to_k, seen), project(attn.to_v, seen))
        want[:, [frame]] = attn.to_out[0](out.transpose(1, 2).flatten(2))
    torch.testing.assert_close(got, want, atol=1e-5, rtol=0)


def refusal(mesh: DeviceMesh, lengths: tuple[int, ...], settings: dict[str, Any], fused: bool) -> str:
    tiny = animatediff()
    if fused:
        tiny.model.fuse_qkv_projections()
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
    ("lengths", "settings", "fused", "message"),
    [
        ((4, 4), {"mode": "official"}, False, "mode='official' is what the released code does with UNet3D"),
        ((4, 4), {"official": True, "clips": 2}, False, "official=True is what the released code does with UNet3D"),
        ((20, 13), {"padding": 16}, False, "a video of 33 frames needs a padding of at most 15, got 16"),
        ((4, 4), {}, True, r"unfuse_qkv_projections"),
    ],
)
def test_what_does_not_fit_is_refused(
    lengths: tuple[int, ...], settings: dict[str, Any], fused: bool, message: str
) -> None:
    for told in on_ranks(2, refusal, lengths, settings, fused):
        assert message in told


def test_a_clip_of_another_length_is_refused() -> None:
    tiny = animatediff()
    with (
        apply_on_clips(tiny.model, FramePlan((4,)), "dual_scope"),
        pytest.raises(ValueError, match="of 4 frames, got 5"),
    ):
        tiny.run()
