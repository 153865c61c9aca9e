"""What clips cost: bytes of a whole denoising run by the formula, and one rank's memory, whatever the length.

The formula, bytes that a rank sends in a step, for P frames of window, K global frames, W ranks, e bytes a number:

    (2 P sides + 2 K / W) e S + sides e C,     S, C: numbers a frame in all attentions and convolutions along the frames

with `sides` = 2 for an inner rank, 1 at an end; it receives W - 1 times the share of the global frames that it sends.
Sizes of layers are read from an unmodified model.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import models
import pytest
import torch
from clip_runs import denoise
from parallel_ranks import on_ranks
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from typer.testing import CliRunner

from diffattn.mechanisms.dual_scope import DualScopeAttention
from diffattn.parallel.frames import apply_on_clips
from diffattn.parallel.operations import collectives
from diffattn.parallel.operations.shares import FramePlan
from scripts import long_video_model

WINDOW = DualScopeAttention(padding=1, top_k=4, local_phase=None, global_phase=None)
SHAPES = {"unet3d": (1, 4, 4, 6), "wan": (1, 4, 6, 10)}
"""Latents of a step, samples and channels first, without their frames."""
OF_ATTENTION = {"unet3d": ("temp_attentions", "transformer_in"), "wan": ("attn1",)}
"""Parts of the names of attentions along the frames."""


def predictor(name: str) -> tuple[torch.nn.Module, Callable[[Tensor, Tensor], Tensor]]:
    """A tiny model, and its call on latents."""
    tiny = getattr(models, name)()
    text = tiny.inputs["encoder_hidden_states"][:1]

    def predict(x: Tensor, t: Tensor) -> Tensor:
        time = t.expand(len(x)) if name == "wan" else t
        return tiny.model(x, timestep=time, encoder_hidden_states=text, return_dict=False)[0]

    return tiny.model, predict


@functools.cache
@torch.no_grad()
def numbers_of_a_frame(name: str, frames: int = 4) -> tuple[int, int]:
    """S and C of a model's layers."""
    model, predict = predictor(name)
    attended = convolved = 0

    def measure(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal attended, convolved
        x = args[0] if args else kwargs["hidden_states"]
        if isinstance(module, torch.nn.Conv3d):
            convolved += x.numel() // frames
        else:
            attended += x.numel() // x.shape[-1] * module.to_k.weight.shape[0] // frames

    for path, module in model.named_modules():
        along = any(part in path for part in OF_ATTENTION[name]) and hasattr(module, "to_k")
        if along or (name == "unet3d" and isinstance(module, torch.nn.Conv3d)):
            module.register_forward_pre_hook(measure, with_kwargs=True)
    predict(torch.zeros(*SHAPES[name][:2], frames, *SHAPES[name][2:]), torch.tensor(3))
    return attended, convolved


def formula(name: str, rank: int, ranks: int, window: DualScopeAttention = WINDOW) -> tuple[float, float]:
    """Bytes that a rank sends and receives in a step, in float32."""
    attended, convolved = numbers_of_a_frame(name)
    sides = (rank > 0) + (rank < ranks - 1)
    near = sides * 4 * (2 * window.padding * attended + convolved)
    share = -(-window.top_k // ranks)  # all ranks send as many: K / W, rounded up
    far = 2 * share * 4 * attended
    return near + far, near + far * (ranks - 1)


@torch.no_grad()
def bytes_of_steps(mesh: DeviceMesh, name: str, frames: int) -> list[tuple[int, int]]:
    """(sent, received) of this rank in every step of a run."""
    plan = FramePlan.split(frames, mesh)
    model, predict = predictor(name)
    steps = []

    def counted(x: Tensor, t: Tensor) -> Tensor:
        plan.traffic.reset()
        out = predict(x, t)
        steps.append((sum(plan.traffic.sent.values()), sum(plan.traffic.received.values())))
        return out

    with apply_on_clips(model, plan, WINDOW):
        denoise(counted, diffusers.DDIMScheduler(clip_sample=False), plan, SHAPES[name], 2)
    return steps


@pytest.mark.dist
@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("name", SHAPES)
def test_every_step_of_a_run_sends_what_the_formula_says(name: str, ranks: int) -> None:
    short, long = (on_ranks(ranks, bytes_of_steps, name, frames) for frames in (4, 32))
    assert short == long, "eight times the frames"
    for rank, steps in enumerate(short):
        assert len(steps) == 3
        for step in steps:
            for counted, wanted in zip(step, formula(name, rank, ranks), strict=True):
                assert wanted <= counted <= 1.05 * wanted, (rank, counted / wanted)


class Wire:
    """The other ranks of a group: takes what is sent to them and answers with zeros; counts the bytes itself."""

    def __init__(self) -> None:
        self.sent = self.received = 0
        self.isend, self.irecv = "send", "receive"

    def all_gather_single(self, out: Tensor, x: Tensor, group: Any) -> None:
        out.zero_()
        self.sent += x.nbytes
        self.received += out.nbytes - x.nbytes

    def P2POp(self, kind: str, tensor: Tensor, group: Any, group_peer: int) -> tuple[str, Tensor]:
        return kind, tensor

    def batch_isend_irecv(self, operations: list[tuple[str, Tensor]]) -> list[Any]:
        for kind, tensor in operations:
            if kind == "send":
                self.sent += tensor.nbytes
            else:
                self.received += tensor.zero_().nbytes
        return [SimpleNamespace(wait=lambda: None)]


@contextmanager
def middle_rank(ranks: int, clip: int) -> Iterator[tuple[FramePlan, Wire]]:
    """The plan of the middle one of many ranks that alone computes."""
    plan, wire = FramePlan((clip,) * ranks, ranks // 2, group="stand-in"), Wire()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(collectives, "dist", wire)
        patch.setattr(FramePlan, "gather_objects", lambda self, value: [value] * self.ranks)
        yield plan, wire


class LiveBytes(TorchDispatchMode):
    """The most bytes that tensors made within it held at once; weights and what was there before do not count."""

    def __init__(self, before: list[Tensor]) -> None:
        super().__init__()
        self.held: dict[int, tuple[StorageWeakRef, int]] = {}
        self.known = {tensor.untyped_storage()._cdata for tensor in before}
        self.peak = self.most = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        for storage in [x.untyped_storage() for x in tree_leaves(out) if isinstance(x, Tensor)]:
            if storage._cdata not in self.known and storage._cdata not in self.held:
                self.held[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
                self.most += storage.nbytes()
        if self.most > self.peak:  # with those that are gone by now
            self.held = {key: (ref, size) for key, (ref, size) in self.held.items() if not ref.expired()}
            self.most = sum(size for _, size in self.held.values())
            self.peak = max(self.peak, self.most)
        return out


@torch.no_grad()
def peak(name: str, ranks: int, clip: int, window: DualScopeAttention = WINDOW) -> int:
    """Bytes of a forward on the middle rank."""
    model, predict = predictor(name)
    x = torch.zeros(*SHAPES[name][:2], clip, *SHAPES[name][2:])
    with middle_rank(ranks, clip) as (plan, _), apply_on_clips(model, plan, window):
        predict(x, torch.tensor(3))  # indices and masks that are kept
        with LiveBytes([x, *model.parameters(), *model.buffers()]) as meter:
            predict(x, torch.tensor(3))
    return meter.peak


def test_a_ranks_memory_is_flat_at_eight_times_the_frames_on_eight_times_the_ranks() -> None:
    clip = 8
    for few, many in ((1, 8), (3, 24)):
        before = peak("unet3d", few, clip)
        assert abs(peak("unet3d", many, clip) / before - 1) < 0.1
    assert peak("unet3d", 24, 2 * clip) > 1.8 * before, "twice the frames on a rank"
    all_keys = DualScopeAttention(padding=1, top_k=24 * clip, local_phase=None, global_phase=None)
    assert peak("unet3d", 24, clip, all_keys) > 1.5 * before, "keys of all frames on a rank"


@pytest.mark.parametrize("top_k", [4, 24])
@pytest.mark.parametrize("ranks", [4, 8, 24])
@pytest.mark.parametrize("name", SHAPES)
@torch.no_grad()
def test_bytes_of_a_rank_on_the_wire(name: str, ranks: int, top_k: int) -> None:
    """Counted where they leave the process, on any number of ranks; `plan.traffic` says the same."""
    model, predict = predictor(name)
    window = dataclasses.replace(WINDOW, top_k=top_k)
    clip = 24 // ranks if name == "wan" else 6  # tiny Wan has phases for 32 frames
    with middle_rank(ranks, clip) as (plan, wire), apply_on_clips(model, plan, window):
        predict(torch.zeros(*SHAPES[name][:2], clip, *SHAPES[name][2:]), torch.tensor(3))
    assert (wire.sent, wire.received) == (sum(plan.traffic.sent.values()), sum(plan.traffic.received.values()))
    for counted, wanted in zip((wire.sent, wire.received), formula(name, plan.rank, ranks, window), strict=True):
        assert wanted <= counted <= 1.05 * wanted


@pytest.mark.parametrize("ranks", [2, 3, 8])
@torch.no_grad()
@pytest.mark.slow
def test_the_model_of_time_counts_what_a_rank_receives(ranks: int) -> None:
    clip = long_video_model.WINDOW.padding
    model = models.unet3d().model.bfloat16()
    sample, text = torch.zeros(2, 4, clip, 4, 6), torch.zeros(2, long_video_model.TEXT_TOKENS, 12)
    with middle_rank(ranks, clip) as (plan, wire), apply_on_clips(model, plan, long_video_model.WINDOW):
        model(sample.bfloat16(), torch.tensor(3), text.bfloat16())
    model = models.unet3d().model.to("meta")
    work = long_video_model.measure(model, clip, 4, 6)
    assert work.received(ranks) == wire.received
    assert work.calls == sum(plan.traffic.calls.values())
    assert not [name for name, module in model.named_modules() if module._forward_pre_hooks]
    some, more, most = (long_video_model.measure(model, frames, 4, 6) for frames in (64, 128, 192))
    assert dataclasses.replace(some, flops=work.flops) == work, "what is exchanged grows with the frames"
    assert most.flops - more.flops == more.flops - some.flops > 0, "work is not linear in the frames"


def test_the_model_of_time_has_the_sizes_of_videocrafter2() -> None:
    with torch.device("meta"):
        unet = diffusers.UNet3DConditionModel()
    work = long_video_model.measure(unet, 2, 40, 64)
    assert abs(work.keys / 34.12e6 - 1) < 1e-3 and abs(work.inputs / (4 * 15.05e6) - 1) < 1e-3
    assert work.groups == 2 * 32 * 105
    assert work.calls == 2 * 34 + 88 + 105


def rows_of(table: str) -> list[list[float]]:
    """The numbers of each row of a Markdown table."""
    rows = [line.strip("|").split("|")[1:] for line in table.splitlines() if " GPU" in line and line.startswith("| ")]
    return [[float(cell) for cell in row] for row in rows[1:]]


def test_the_table_adds_up() -> None:
    work = long_video_model.Work(flops=int(3e15), keys=int(3e7), inputs=int(6e7), groups=6720, calls=261)
    text = long_video_model.table(work, 5, 18, 4, 30)
    alone, *shared = rows_of(text)
    assert alone[0] == alone[2] == round(30 * 3e15 / 5 * 18 / (989e12 * 0.4), 1) and alone[1:] == [0, alone[2], 1]
    for (computing, talking, both, gain), link in zip(shared, long_video_model.LINKS, strict=True):
        assert computing == round(30 * 3e15 / (989e12 * 0.4), 1)
        assert abs(talking - 30 * (work.received(4) / link.bandwidth + 261 * link.latency)) < 0.06
        assert abs(both - computing - talking) < 0.11 and abs(gain - alone[2] / both) < 0.01
    assert "This is a model, not a measurement." in text and "18 frames on 4 GPUs" in text


@pytest.mark.slow
def test_the_table_in_the_document_is_the_scripts() -> None:
    result = CliRunner().invoke(long_video_model.app, [])
    page = (Path(__file__).parents[2] / "docs" / "long-video.md").read_text()
    assert result.stdout.strip() in page, "put the output of python scripts/long_video_model.py there"


def test_the_script_shows_an_example() -> None:
    assert (
        "python scripts/long_video_model.py --frames 480" in CliRunner().invoke(long_video_model.app, ["--help"]).output
    )
    for wrong in (["--gpus", "1"], ["--frames", "7", "--gpus", "8"]):
        assert CliRunner().invoke(long_video_model.app, wrong).exit_code == 2
