"""A tiny UNet3D on clips: the same output on any number of ranks, for any split."""

import gc
from collections.abc import Callable
from typing import Any

import diffusers
import models
import pytest
import torch
from clip_splits import clip_of, plan_of
from models import Tiny
from parallel_ranks import on_ranks
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

import diffattn
from diffattn.mechanisms.dual_scope import DualScopeAttention
from diffattn.parallel.frames import apply_on_clips
from diffattn.parallel.operations.shares import FramePlan
from diffattn.parallel.prompts import frame_prompts

FRAMES = 8
SPLITS = [(8,), (4, 4), (1, 7), (5, 3), (3, 3, 2), (1, 6, 1), (2, 2, 2, 2), (1, 1, 1, 5)]
DUAL = DualScopeAttention(padding=2, top_k=3)
EVERYTHING = DualScopeAttention(padding=FRAMES, top_k=0, local_phase=None, global_phase=None)
TOLERANCE = 1e-4


def unet(frames: int = FRAMES) -> Tiny:
    tiny = models.unet3d()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in tiny.model.named_parameters():
            if "conv4" in name:  # made of zeros, which would hide the convolutions
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    tiny.inputs = {**tiny.inputs, "sample": torch.randn(2, 4, frames, 4, 6, generator=generator)}
    return tiny


def run_clip(tiny: Tiny, plan: FramePlan, **changes: Any) -> Tensor:
    inputs = {**tiny.inputs, "sample": clip_of(tiny.inputs["sample"], plan, 2), **changes}
    return tiny.model(**inputs, return_dict=False)[0]


@torch.no_grad()
def run(tiny: Tiny) -> Tensor:
    return tiny.model(**tiny.inputs, return_dict=False)[0]


@torch.no_grad()
def forward(mesh: DeviceMesh | None, lengths: tuple[int, ...], mechanism: DualScopeAttention, by_frame: bool) -> Tensor:
    plan = FramePlan(lengths) if mesh is None else plan_of(mesh, lengths)
    tiny = unet()
    changes = {}
    if by_frame:
        text = tiny.inputs["encoder_hidden_states"]
        changes = {"encoder_hidden_states": frame_prompts({1: text, 6: text.flip(-1)}, range(FRAMES))}
    with apply_on_clips(tiny.model, plan, mechanism):
        return run_clip(tiny, plan, **changes)


@pytest.mark.dist
@pytest.mark.parametrize("lengths", SPLITS, ids=str)
@pytest.mark.parametrize("by_frame", [False, True], ids=["one prompt", "a prompt for each frame"])
def test_no_split_changes_the_output(lengths: tuple[int, ...], by_frame: bool) -> None:
    want = forward(None, (FRAMES,), DUAL, by_frame)
    assert float(want.abs().max()) > 0.1
    got = torch.cat(on_ranks(len(lengths), forward, lengths, DUAL, by_frame), dim=2)
    torch.testing.assert_close(got, want, atol=TOLERANCE, rtol=0)


@pytest.mark.dist
@pytest.mark.parametrize("lengths", SPLITS, ids=str)
def test_a_window_over_everything_is_the_unmodified_model(lengths: tuple[int, ...]) -> None:
    tiny = unet()
    want = run(tiny)
    with diffattn.apply(tiny.model, DUAL):
        assert float((run(tiny) - want).abs().max()) > 10 * TOLERANCE
    got = torch.cat(on_ranks(len(lengths), forward, lengths, EVERYTHING, False), dim=2)
    torch.testing.assert_close(got, want, atol=TOLERANCE, rtol=0)


def test_one_rank_alone_is_the_swapped_model() -> None:
    tiny = unet()
    with diffattn.apply(tiny.model, DUAL):
        want = run(tiny)
    with apply_on_clips(tiny.model, FramePlan((FRAMES,)), DUAL):
        assert torch.equal(run(tiny), want)


def test_prompts_of_the_frames_reach_their_frames() -> None:
    tiny, plan = unet(), FramePlan((FRAMES,))
    text = tiny.inputs["encoder_hidden_states"]
    with apply_on_clips(tiny.model, plan, DUAL):
        want = run(tiny)
        same = text[:, None].expand(-1, FRAMES, -1, -1)
        torch.testing.assert_close(run_clip(tiny, plan, encoder_hidden_states=same), want, atol=1e-6, rtol=0)
        other = same.clone()
        other[:, 3] = 0
        assert not torch.allclose(run_clip(tiny, plan, encoder_hidden_states=other), want, atol=1e-3)
        assert torch.equal(run(tiny), want)
        with pytest.raises(ValueError, match="a prompt for each of this rank's 8 frames"):
            run_clip(tiny, plan, encoder_hidden_states=other[:, :5])


def state_of(model: torch.nn.Module) -> dict[str, Any]:
    """Everything that hangs on the modules, beside their parameters."""
    kept = {}
    for name, module in model.named_modules():
        own = {key: value for key, value in vars(module).items() if key not in ("_parameters", "_buffers", "_modules")}
        kept[name] = {key: len(value) if "hooks" in key else value for key, value in own.items()}
    return kept


@pytest.mark.parametrize("undo", ["handle", "diffattn", "with", "apply"])
@pytest.mark.parametrize("mode", ["clean", "official"])
def test_undoing_gives_the_model_back(undo: str, mode: Any) -> None:
    tiny = unet()
    want, before = run(tiny), state_of(tiny.model)
    names = set(tiny.model.state_dict())
    handle = apply_on_clips(tiny.model, FramePlan((FRAMES,)), DUAL, mode=mode)
    assert not torch.equal(run(tiny), want)
    assert set(tiny.model.state_dict()) == names
    if undo == "handle":
        handle.restore()
    elif undo == "with":
        with handle:
            pass
    else:
        if undo == "apply":
            diffattn.apply(tiny.model, DUAL)
        diffattn.restore(tiny.model)
    assert torch.equal(run(tiny), want)
    assert state_of(tiny.model) == before


def test_applying_again_replaces_the_first() -> None:
    tiny, plan = unet(), FramePlan((FRAMES,))
    want = run(tiny)
    apply_on_clips(tiny.model, plan, DUAL, mode="official")
    with apply_on_clips(tiny.model, plan, "dual_scope", padding=2, top_k=3):
        with_second = run(tiny)
    assert torch.equal(run(tiny), want)
    with apply_on_clips(tiny.model, plan, DUAL):
        assert torch.equal(run(tiny), with_second)


@torch.no_grad()
def restored(mesh: DeviceMesh) -> bool:
    tiny, plan = unet(), FramePlan.split(FRAMES, mesh)
    want = run(tiny)
    with apply_on_clips(tiny.model, plan, DUAL):
        run_clip(tiny, plan)
    return torch.equal(run(tiny), want)


@pytest.mark.dist
def test_restoring_on_ranks_is_exact() -> None:
    assert on_ranks(3, restored) == [True] * 3


@torch.no_grad()
def bytes_of_a_forward(mesh: DeviceMesh, frames: int) -> tuple[dict[str, int], dict[str, int], int, int]:
    tiny, plan = unet(frames), FramePlan.split(frames, mesh)
    sizes = {"keys": 0, "conv": 0}

    def measure(kind: str) -> Callable[..., None]:
        def hook(module: torch.nn.Module, args: tuple[Tensor, ...], output: Any) -> None:
            x = output if kind == "keys" else args[0]
            sizes[kind] += x.numel() // plan.length * x.element_size()

        return hook

    for name, module in tiny.model.named_modules():
        if name.endswith("to_k") and ("temp_attentions" in name or "transformer_in" in name):
            module.register_forward_hook(measure("keys"))
        elif isinstance(module, torch.nn.Conv3d):
            module.register_forward_hook(measure("conv"))
    with apply_on_clips(tiny.model, plan, "dual_scope", padding=2, top_k=8, local_phase=None, global_phase=None):
        run_clip(tiny, plan)
    return plan.traffic.sent, plan.traffic.received, sizes["keys"], sizes["conv"]


@pytest.mark.dist
def test_bytes_of_a_forward_are_those_of_the_formula() -> None:
    ranks, padding, top_k = 4, 2, 8
    for frames in (8, 16):
        sent, received, keys, conv = on_ranks(ranks, bytes_of_a_forward, frames)[1]
        assert keys > 0 and conv > 0
        assert sent["halo"] == received["halo"] == 4 * padding * keys
        assert sent["gather"] == 2 * top_k // ranks * keys
        assert received["gather"] == 2 * top_k * (ranks - 1) // ranks * keys
        assert sent["conv"] == received["conv"] == 2 * conv


def gradient(mesh: DeviceMesh | None) -> tuple[Tensor, Tensor]:
    """Of the input of this rank, and of a parameter, which the ranks have to add up."""
    tiny = unet()
    plan = FramePlan((FRAMES,)) if mesh is None else plan_of(mesh, (5, 1, 2))
    loss = torch.linspace(-1, 1, 2 * 4 * FRAMES * 4 * 6).view(2, 4, FRAMES, 4, 6)
    sample = clip_of(tiny.inputs["sample"], plan, 2).requires_grad_()
    with torch.enable_grad(), apply_on_clips(tiny.model, plan, DUAL):
        (run_clip(tiny, plan, sample=sample) * clip_of(loss, plan, 2)).sum().backward()
    assert sample.grad is not None
    return sample.grad, tiny.model.transformer_in.proj_in.weight.grad


@pytest.mark.dist
def test_gradients_are_those_of_one_process() -> None:
    sample, weight = gradient(None)
    samples, weights = zip(*on_ranks(3, gradient), strict=True)
    scale = float(sample.abs().max())
    torch.testing.assert_close(torch.cat(samples, dim=2), sample, atol=1e-3 * scale, rtol=0)
    torch.testing.assert_close(sum(weights), weight, atol=1e-3 * float(weight.abs().max()), rtol=0)


def refusal(mesh: DeviceMesh, settings: list[dict[str, Any]]) -> str:
    own = dict(settings[mesh.get_local_rank()])
    lengths = own.pop("lengths", (4, 4))
    plan = FramePlan(lengths, mesh.get_local_rank(), mesh.get_group())
    tiny = getattr(models, own.pop("model", "unet3d"))()
    before = state_of(tiny.model)
    try:
        apply_on_clips(tiny.model, plan, own.pop("mechanism", "dual_scope"), **own)
    except (TypeError, ValueError) as error:
        assert state_of(tiny.model) == before
        return str(error)
    return "accepted"


@pytest.mark.dist
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ([{}, {"padding": 3}], "the ranks disagree"),
        ([{"padding": 2}, {"padding": 2, "mode": "official"}], "the ranks disagree"),
        ([{"lengths": (4, 4)}, {"lengths": (5, 3)}], "the ranks disagree"),
        ([{}, {"padding": -1}], "padding must be an int"),
        ([{"mode": "fast"}] * 2, "mode must be 'clean' or 'official'"),
        ([{"mechanism": "clear", "radius": 2}] * 2, "is DualScopeAttention, got clear"),
        ([{"model": "sd15"}] * 2, "can't be split into clips yet; models that can: UNet3DConditionModel"),
        ([{"mode": "official", "padding": 2, "lengths": (5, 3)}] * 2, "equal"),
        ([{"mode": "official", "padding": 5}] * 2, "at least padding=5"),
    ],
)
def test_every_rank_refuses_what_does_not_fit(settings: list[dict[str, Any]], message: str) -> None:
    for told in on_ranks(2, refusal, settings):
        assert message in told


def test_a_clip_of_another_length_is_refused() -> None:
    tiny = unet()
    with apply_on_clips(tiny.model, FramePlan((5,)), DUAL), pytest.raises(ValueError, match="clip of 5 frames, got 8"):
        run(tiny)
    with pytest.raises(ValueError, match="need a process group"):
        apply_on_clips(tiny.model, FramePlan((4, 4)), DUAL)


def test_a_failure_half_way_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = unet()
    before = state_of(tiny.model)

    def fail(*arguments: Any, **options: Any) -> None:
        raise RuntimeError("half way")

    monkeypatch.setattr("diffattn.parallel.video_models.unet3d.HaloConv", fail)
    with pytest.raises(RuntimeError, match="half way"):
        apply_on_clips(tiny.model, FramePlan((FRAMES,)), DUAL)
    assert state_of(tiny.model) == before


class Pipeline:
    """A pipeline's parts, without its call."""

    def __init__(self, unet: torch.nn.Module, scheduler: Any) -> None:
        self.components, self.scheduler = {"unet": unet, "scheduler": scheduler}, scheduler


def test_a_pipeline_may_tell_the_phases_by_its_noise() -> None:
    """What only a pipeline knows, its scheduler's sigma, reaches the layers on clips."""
    tiny = unet()
    pipe = Pipeline(tiny.model, diffusers.DDIMScheduler())
    pipe.scheduler.set_timesteps(4)
    options = dict(padding=2, top_k=3, phase_by="sigma", local_phase=(0.5, 3.0, 0.0), global_phase=(0.5, 0.0, 3.0))
    with pytest.raises(ValueError, match="needs sigma"):
        apply_on_clips(tiny.model, FramePlan((FRAMES,)), **options)
    outputs = []
    for timestep in (pipe.scheduler.timesteps[0], pipe.scheduler.timesteps[-1]):
        tiny.inputs["timestep"] = timestep
        with diffattn.apply(pipe, "dual_scope", **options):
            want = run(tiny)
        with apply_on_clips(pipe, FramePlan((FRAMES,)), **options):
            assert torch.equal(run(tiny), want)
        outputs.append(want)
    assert not torch.equal(*outputs)


def test_nothing_is_kept_of_a_model_that_is_gone() -> None:
    tiny = unet()
    apply_on_clips(tiny.model, FramePlan((FRAMES,)), DUAL).restore()
    gc.collect()
    assert not [name for name, module in tiny.model.named_modules() if hasattr(module, "_diffusers_hook")]
