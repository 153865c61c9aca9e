"""A tiny CogVideoX on clips: a whole denoising run is the same on any number of ranks, for any split."""

from typing import Any

import diffusers
import models
import pytest
import torch
from clip_runs import SPLITS, denoise, state_of
from clip_splits import plan_of
from diffusers.models.embeddings import get_3d_rotary_pos_embed
from parallel_ranks import on_ranks
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from diffattn.mechanisms.dual_scope import DualScopeAttention
from diffattn.parallel.frames import apply_on_clips
from diffattn.parallel.operations.shares import FramePlan

TOLERANCE = 1e-4
FREE = dict(local_phase=None, global_phase=None)
MECHANISMS = {
    "dual": DualScopeAttention(padding=2, top_k=3),
    "longer than training": DualScopeAttention(padding=1, top_k=3, train_frames=4, **FREE),
    "everything": DualScopeAttention(padding=8, top_k=0, **FREE),
}
ROTARY = dict(use_rotary_positional_embeddings=True)
VARIANTS: dict[str, dict[str, Any]] = {
    "sines": {},
    "rotary": ROTARY,
    "learned": {**ROTARY, "use_learned_positional_embeddings": True, "sample_frames": 29},
    "1.5": {**ROTARY, "patch_size_t": 2, "patch_bias": False},
}


def cogvideox(variant: str) -> models.Tiny:
    tiny = models.cogvideox()
    config = {
        **tiny.model.config,
        "sample_height": 4,
        "sample_width": 6,
        **VARIANTS[variant],
        "_use_default_values": [],
    }
    with torch.random.fork_rng():
        tiny.model = models.randomize(diffusers.CogVideoXTransformer3DModel.from_config(config))
    if variant == "learned":
        rows = tiny.model.patch_embed.pos_embedding
        rows[:, models.TEXT :] = torch.randn(rows[:, models.TEXT :].shape, generator=torch.Generator().manual_seed(5))
    return tiny


def tables(frames: int) -> tuple[Tensor, Tensor]:
    """As a pipeline makes them, for 2 x 3 places."""
    return get_3d_rotary_pos_embed(16, ((0, 0), (2, 3)), (2, 3), frames)


def frames_of(variant: str) -> int:
    return 12 if variant == "1.5" else 8


def splits_of(variant: str) -> list[tuple[int, ...]]:
    if variant == "1.5":
        return [tuple(2 * length for length in lengths) for lengths in SPLITS[6]]
    return SPLITS[8]


@torch.no_grad()
def run(
    mesh: DeviceMesh | None, lengths: tuple[int, ...], variant: str, name: str | None, whole: bool = False
) -> tuple[Tensor, bool]:
    """This rank's frames, and whether the model is itself again afterwards; `whole`: with the whole video's tables."""
    plan = FramePlan(lengths) if mesh is None else plan_of(mesh, lengths)
    tiny = cogvideox(variant)
    patch = tiny.model.config.patch_size_t or 1
    text = tiny.inputs["encoder_hidden_states"][:1]

    def predict(x: Tensor, t: Tensor, frames: int = plan.frames if whole else plan.length) -> Tensor:
        rotary = None if variant == "sines" else tables(frames // patch)
        return tiny.model(x, text, t.expand(1), image_rotary_emb=rotary, return_dict=False)[0]

    def alone() -> Tensor:
        return predict(torch.ones(1, plan.length, 4, 4, 6), torch.tensor(5), plan.length)

    def denoised() -> Tensor:
        return denoise(predict, diffusers.CogVideoXDDIMScheduler(), plan, (1, 4, 4, 6), 1)

    if name is None:
        return denoised(), True
    before, state = alone(), state_of(tiny.model)
    with apply_on_clips(tiny.model, plan, MECHANISMS[name]):
        out = denoised()
    return out, torch.equal(alone(), before) and state_of(tiny.model) == state


def joined(lengths: tuple[int, ...], *settings: Any) -> Tensor:
    parts, restored = zip(*on_ranks(len(lengths), run, lengths, *settings), strict=True)
    assert all(restored)
    return torch.cat(parts, dim=1)


@pytest.mark.dist
@pytest.mark.parametrize("name", ["dual", "longer than training"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_no_split_changes_a_run(variant: str, name: str) -> None:
    want, _ = run(None, (frames_of(variant),), variant, name)
    for lengths in splits_of(variant):
        torch.testing.assert_close(joined(lengths, variant, name), want, atol=TOLERANCE, rtol=0)


@pytest.mark.dist
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_window_over_everything_is_the_unmodified_model(variant: str) -> None:
    want, _ = run(None, (frames_of(variant),), variant, None)
    dual, _ = run(None, (frames_of(variant),), variant, "dual")
    assert float((want - dual).abs().max()) > 100 * TOLERANCE
    for lengths in [(frames_of(variant),), *splits_of(variant)[:-1]]:
        torch.testing.assert_close(joined(lengths, variant, "everything"), want, atol=TOLERANCE, rtol=0)


@pytest.mark.dist
def test_tables_may_be_those_of_the_whole_video() -> None:
    want, _ = run(None, (8,), "rotary", "dual")
    for lengths in ((1, 7), (3, 3, 2)):
        torch.testing.assert_close(joined(lengths, "rotary", "dual", True), want, atol=TOLERANCE, rtol=0)


@torch.no_grad()
def text_after(mesh: DeviceMesh, name: str) -> Tensor:
    plan, tiny = plan_of(mesh, (3, 4, 1)), cogvideox("rotary")
    seen: list[Tensor] = []
    tiny.model.transformer_blocks[-1].register_forward_hook(lambda module, args, output: seen.append(output[1]))
    with apply_on_clips(tiny.model, plan, MECHANISMS[name]):
        x = torch.randn(1, plan.frames, 4, 4, 6)[:, plan.own.start : plan.own.stop]
        tiny.model(x, tiny.inputs["encoder_hidden_states"][:1], torch.tensor([5]), image_rotary_emb=tables(plan.length))
    return seen[0]


@pytest.mark.dist
@pytest.mark.parametrize("name", list(MECHANISMS))
def test_the_text_is_the_same_on_every_rank(name: str) -> None:
    first, *others = on_ranks(3, text_after, name)
    for other in others:
        torch.testing.assert_close(other, first, atol=1e-6, rtol=0)


def refusal(mesh: DeviceMesh, lengths: tuple[int, ...], variant: str, settings: dict[str, Any]) -> str:
    tiny = cogvideox(variant)
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
    ("lengths", "variant", "settings", "message"),
    [
        ((4, 4), "sines", {"mode": "official"}, "mode='official' is what the released code does with UNet3D"),
        ((4, 4), "rotary", {"official": True, "clips": 2}, "official=True is what the released code does"),
        ((4, 3), "1.5", {}, "clips must have multiples of 2 frames, got (4, 3)"),
    ],
)
def test_what_does_not_fit_is_refused(
    lengths: tuple[int, ...], variant: str, settings: dict[str, Any], message: str
) -> None:
    for told in on_ranks(2, refusal, lengths, variant, settings):
        assert message in told


@torch.no_grad()
def test_calls_that_do_not_fit_are_refused() -> None:
    tiny, text, t = cogvideox("rotary"), torch.randn(1, models.TEXT, 12), torch.tensor([5])
    with apply_on_clips(tiny.model, FramePlan((4,)), "dual_scope"):
        with pytest.raises(ValueError, match="needs image_rotary_emb"):
            tiny.model(torch.ones(1, 4, 4, 4, 6), text, t)
        with pytest.raises(ValueError, match="this rank's 4 frames, or in the video's 4, got 18 rows"):
            tiny.model(torch.ones(1, 4, 4, 4, 6), text, t, image_rotary_emb=tables(3))
    tiny = cogvideox("learned")
    with (
        apply_on_clips(tiny.model, FramePlan((8,)), "dual_scope"),
        pytest.raises(ValueError, match="learned positions"),
    ):
        tiny.model(
            torch.ones(1, 8, 4, 6, 6),
            text,
            t,
            image_rotary_emb=get_3d_rotary_pos_embed(16, ((0, 0), (3, 3)), (3, 3), 8),
        )
    tiny = cogvideox("sines")
    with apply_on_clips(tiny.model, FramePlan((4,)), "dual_scope"), pytest.raises(ValueError, match="4 frames"):
        tiny.model(torch.ones(1, 3, 4, 4, 6), text, t)
