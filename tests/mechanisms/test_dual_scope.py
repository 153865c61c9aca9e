"""Dual-scope attention: who is seen, with what bias, in which memory, and inside models."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import models
import pytest
import torch
from tolerances import TOLERANCE, assert_close
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import diffattn
from diffattn import TokenGrid
from diffattn.mechanisms import Context, DualScopeAttention
from diffattn.mechanisms.parts.scopes.frames import Phase, global_frames, official_global_frames, phase_biases

NO_BIAS: dict[str, Any] = {"local_phase": None, "global_phase": None}
PHASES: dict[str, Any] = {"local_phase": Phase(300, 2.0, -1.0), "global_phase": Phase(600, 0.5, 1.5)}
EARLY, LATE, NEITHER = Context(timestep=700), Context(timestep=100), Context(timestep=450)

GRIDS = [
    TokenGrid(1, 1, frames=23),
    TokenGrid(1, 1, frames=2),
    TokenGrid(1, 1, frames=131),  # several blocks of frames
    TokenGrid(2, 3, frames=7),
    TokenGrid(2, 3, frames=23, before=3),
    TokenGrid(3, 2, frames=5, before=2, after=4),
    TokenGrid(8, 9, frames=5, after=1),  # one frame to a block
]


def inputs(grid: TokenGrid, dtype: torch.dtype = torch.float64, batch: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = torch.randn(3, batch, 3, grid.tokens, 8, dtype=torch.float64).to(dtype)
    return q, k, v


def by_dense_mask(
    q: Tensor, k: Tensor, v: Tensor, grid: TokenGrid, padding: int, top_k: int, local: float, global_: float
) -> Tensor:
    """Tokens see tokens under one additive matrix. A frame seen twice counts once."""
    shared = {g * grid.frames // top_k for g in range(top_k)}
    of_frames = torch.empty(grid.frames, grid.frames, dtype=q.dtype)
    for i in range(grid.frames):
        for j in range(grid.frames):
            seen = [local] * (abs(i - j) <= padding) + [global_] * (j in shared)
            of_frames[i, j] = max(seen, default=-torch.inf)
    bias = torch.zeros(grid.tokens, grid.tokens, dtype=q.dtype)
    bias[grid.cell_slice] = max(local, global_) if top_k else local  # text, as seen by the cells
    size = grid.height * grid.width
    bias[grid.cell_slice, grid.cell_slice] = of_frames.repeat_interleave(size, 0).repeat_interleave(size, 1)
    return ((q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5 + bias).softmax(dim=-1) @ v


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize(("padding", "top_k"), [(2, 3), (0, 0), (0, 4), (1, 0), (3, 100), (200, 2)])
@pytest.mark.parametrize(
    ("context", "biases"),
    [(EARLY, (0.5, 1.5)), (LATE, (2.0, -1.0)), (NEITHER, (0.0, 0.0))],
    ids=["early", "late", "no"],
)
def test_it_is_softmax_under_a_dense_bias(
    grid: TokenGrid, padding: int, top_k: int, context: Context, biases: tuple[float, float]
) -> None:
    q, k, v = inputs(grid)
    mechanism = DualScopeAttention(padding=padding, top_k=top_k, **PHASES)
    want = by_dense_mask(q, k, v, grid, padding, top_k, *biases)
    assert_close(mechanism.attend(q, k, v, grid, context=context), want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", [{}, {"official": True}, {"token_num_scale": True}], ids=str)
@pytest.mark.parametrize("grid", GRIDS[2:5], ids=str)
def test_lower_precision_with_biases(grid: TokenGrid, options: dict[str, Any], dtype: torch.dtype) -> None:
    q, k, v = inputs(grid, dtype)
    mechanism = DualScopeAttention(padding=2, top_k=3, **options)
    for timestep in (900, 100):
        context = Context(timestep=timestep)
        out = mechanism.attend(q, k, v, grid, context=context)
        assert out.dtype == dtype
        assert_close(out, mechanism.reference(q.double(), k.double(), v.double(), grid, context=context))


@pytest.mark.parametrize("options", [{}, {"official": True, "clips": 2}, {"duplicates": True}], ids=str)
@pytest.mark.parametrize("grid", [TokenGrid(1, 1, frames=70), TokenGrid(2, 3, frames=14, before=2, after=1)], ids=str)
@pytest.mark.parametrize("mask", ["no mask", "bool", "additive", "by query"])
def test_the_models_mask_and_gradients(grid: TokenGrid, options: dict[str, Any], mask: str) -> None:
    made = {
        "no mask": None,
        "bool": torch.rand(2, 1, 1, grid.tokens) > 0.3,
        "additive": torch.randn(2, 1, 1, grid.tokens),
        "by query": torch.randn(1, 3, grid.tokens, grid.tokens),
    }[mask]
    context = Context(timestep=100, mask=made)
    mechanism = DualScopeAttention(padding=2, top_k=6, token_num_scale=True, train_frames=4, **PHASES, **options)
    q, k, v = (x.requires_grad_() for x in inputs(grid))
    out, want = (f(q, k, v, grid, context=context) for f in (mechanism.attend, mechanism.reference))
    assert_close(out, want)
    weight = torch.randn_like(out)
    got = torch.autograd.grad((out * weight).sum(), (q, k, v))
    for left, right in zip(got, torch.autograd.grad((want * weight).sum(), (q, k, v)), strict=True):
        assert_close(left, right, "gradient")


def test_a_window_over_the_whole_video_is_exact_attention() -> None:
    grid = TokenGrid(2, 2, frames=9, after=3)
    q, k, v = inputs(grid)
    for options in ({"top_k": 0}, {"top_k": 4}):
        out = DualScopeAttention(padding=8, **options, **NO_BIAS).attend(q, k, v, grid)
        assert_close(out, F.scaled_dot_product_attention(q, k, v))
    twice = DualScopeAttention(padding=8, top_k=4, duplicates=True, **NO_BIAS).attend(q, k, v, grid)
    assert not torch.allclose(twice, F.scaled_dot_product_attention(q, k, v), atol=1e-3)


@pytest.mark.parametrize("official", [False, True])
def test_one_frame_is_exact_attention_in_any_phase(official: bool) -> None:
    grid = TokenGrid(3, 5, before=2)
    q, k, v = inputs(grid)
    out = DualScopeAttention(official=official).attend(q, k, v, grid)
    assert_close(out, F.scaled_dot_product_attention(q, k, v))


def test_frames_out_of_sight_change_nothing() -> None:
    grid = TokenGrid(2, 1, frames=20)
    q, k, v = inputs(grid)
    mechanism = DualScopeAttention(padding=2, top_k=2, **NO_BIAS)  # global: 0 and 10
    out = mechanism.attend(q, k, v, grid)
    k[:, :, 2 * 15 : 2 * 16], v[:, :, 2 * 15 : 2 * 16] = 5.0, 7.0
    changed = (mechanism.attend(q, k, v, grid) != out).flatten(3).any(-1).any(0).any(0).view(20, 2).all(-1)
    assert changed.nonzero().flatten().tolist() == [13, 14, 15, 16, 17]


def test_the_ends_are_masked_and_the_released_code_sees_zeros_there() -> None:
    grid = TokenGrid(1, 1, frames=12)
    q, k, _ = inputs(grid)
    ones = torch.ones_like(k)
    clean = DualScopeAttention(padding=3, top_k=0, **NO_BIAS).attend(q, k, ones, grid)
    assert_close(clean, ones)
    official = DualScopeAttention(padding=3, top_k=0, official=True, **NO_BIAS).attend(q, k, ones, grid)
    assert_close(official[:, :, 3:-3], ones[:, :, 3:-3])
    assert (official[:, :, :3] < 0.99).all() and (official[:, :, -3:] < 0.99).all()


def test_text_keeps_its_share_in_every_phase() -> None:
    """A bias of 10 on one scope must not drown the text."""
    grid = TokenGrid(1, 1, frames=30, after=4)
    q, k, v = inputs(grid)
    k, v = 0.1 * k, torch.zeros_like(v)
    v[:, :, 30:] = 1
    for timestep in (900, 100):
        out = DualScopeAttention(padding=2, top_k=4).attend(q, k, v, grid, context=Context(timestep=timestep))
        assert (out[:, :, :30] > 0.25).all(), "4 text tokens beside at most 9 frames"


def test_global_frames_are_spread_over_the_whole_video() -> None:
    assert global_frames(16, 4) == (0, 4, 8, 12)
    assert global_frames(7, 3) == (0, 2, 4)
    assert global_frames(3, 8) == (0, 1, 2)
    assert global_frames(3, 4, distinct=False) == (0, 0, 1, 2)
    assert global_frames(5, 0) == ()


def test_the_released_code_cuts_its_choice_short() -> None:
    assert official_global_frames(16, 4, 1) == official_global_frames(16, 4, 4) == (0, 4, 8, 12)
    assert official_global_frames(28, 10, 2) == (0, 2, 4, 6, 8, 10, 12, 14, 16, 18)
    assert official_global_frames(16, 3, 4) == (0, 4, 8)  # fewer keys than clips
    assert official_global_frames(16, 0, 4) == ()
    assert official_global_frames(8, 16, 2) == (0, 1, 2, 3, 4, 5, 6, 7)


def test_phases_switch_at_their_thresholds() -> None:
    late, early = Phase(800, 10, 1), Phase(800, 2, 20)
    assert phase_biases(late, early, 799.9) == (10, 1)
    assert phase_biases(late, early, 800) == (2, 20)
    assert phase_biases(Phase(800, 10, 1), Phase(600, 2, 20), 700) == (12, 21)  # both
    assert phase_biases(Phase(300, 10, 1), Phase(600, 2, 20), 400) == (0, 0)  # neither
    assert phase_biases(Phase(None, 3, 4), None, None) == (3, 4)


@pytest.mark.parametrize("by", ["timestep", "sigma"])
def test_early_steps_look_far_and_late_steps_near(by: Any) -> None:
    grid = TokenGrid(1, 1, frames=40)
    q, k, v = inputs(grid)
    threshold = 800 if by == "timestep" else 0.8
    mechanism = DualScopeAttention(
        padding=2, top_k=4, phase_by=by, local_phase=Phase(threshold, 30), global_phase=Phase(threshold, 0, 30)
    )
    far = F.scaled_dot_product_attention(q, k[:, :, ::10], v[:, :, ::10])
    early = mechanism.attend(q, k, v, grid, context=Context(**{by: threshold}))
    torch.testing.assert_close(early, far, atol=1e-8, rtol=0)
    near = DualScopeAttention(padding=2, top_k=0, **NO_BIAS).attend(q, k, v, grid)
    late = mechanism.attend(q, k, v, grid, context=Context(**{by: threshold * 0.99}))
    torch.testing.assert_close(late, near, atol=1e-8, rtol=0)


def test_token_num_scale_counts_the_frames_in_sight() -> None:
    grid = TokenGrid(1, 1, frames=10)
    q, k, v = inputs(grid)
    options: dict[str, Any] = {"padding": 9, "top_k": 0, "token_num_scale": True, **NO_BIAS}
    plain = F.scaled_dot_product_attention(q, k, v)
    assert_close(DualScopeAttention(train_frames=10, **options).attend(q, k, v, grid), plain)
    sharper = F.scaled_dot_product_attention(
        q, k, v, scale=8**-0.5 * torch.tensor(10.0).log().item() / 0.6931471805599453
    )
    torch.testing.assert_close(
        DualScopeAttention(train_frames=2, **options).attend(q, k, v, grid), sharper, atol=1e-6, rtol=0
    )


def test_phases_without_their_time_are_an_error() -> None:
    grid = TokenGrid(1, 1, frames=6)
    with pytest.raises(ValueError, match=r"need the timestep .* context=Context\(timestep=...\)"):
        DualScopeAttention().attend(*inputs(grid), grid)
    mechanism = DualScopeAttention(phase_by="sigma", local_phase=(0.8, 10, 0), global_phase=None)
    with pytest.raises(ValueError, match="need the sigma .* apply it to a pipeline"):
        mechanism.attend(*inputs(grid), grid, context=Context(timestep=3))
    with pytest.raises(ValueError, match="pass the pipeline, not its model"):
        diffattn.apply(models.wan().model, mechanism)
    assert DualScopeAttention().needs == {"timestep"} and mechanism.needs == {"sigma"}
    assert (
        DualScopeAttention(**NO_BIAS).needs
        == DualScopeAttention(local_phase=(None, 1), global_phase=None).needs
        == set()
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"padding": -1}, "padding must be an int of at least 0"),
        ({"padding": 1.5}, "padding must be an int"),
        ({"top_k": -1}, "top_k must be"),
        ({"train_frames": 1}, "train_frames must be an int of at least 2"),
        ({"attn_scale": 0}, "attn_scale must be a positive number"),
        ({"phase_by": "step"}, "phase_by must be 'timestep' or 'sigma'"),
        ({"local_phase": 800}, "local_phase must be None or"),
        ({"local_phase": ("800", 1, 1)}, "local_phase must be None or"),
        ({"global_phase": (1, 2, 3, 4)}, "global_phase must be None or"),
        ({"global_phase": (800, float("inf"))}, "global_phase must be None or"),
        ({"phase_by": "sigma"}, "share of noise between 0 and 1"),
        ({"clips": 2}, "add official=True"),
        ({"official": True, "padding": 0}, "padding of at least 1"),
    ],
)
def test_wrong_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DualScopeAttention(**options)


def test_grids_that_the_released_code_cannot_serve() -> None:
    mechanism = DualScopeAttention(padding=3, official=True, clips=4)
    with pytest.raises(ValueError, match="no multiple of clips=4"):
        mechanism.check(TokenGrid(1, 1, frames=13))
    with pytest.raises(ValueError, match="at least padding=3 frames"):
        mechanism.attend(*inputs(TokenGrid(1, 1, frames=8)), TokenGrid(1, 1, frames=8), context=EARLY)
    with pytest.raises(NotImplementedError, match="seen twice"):
        mechanism.mask(TokenGrid(1, 1, frames=12))


@pytest.mark.parametrize("clips", [1, 2, 3])
def test_flops_of_the_released_code_count_zeros_and_duplicates(clips: int) -> None:
    mechanism = DualScopeAttention(padding=2, top_k=6, official=True, clips=clips)
    assert mechanism.flops(TokenGrid(2, 1, frames=18), 3, 16) == 4 * 18 * (5 + 6) * 2**2 * 3 * 16


class Sizes(TorchFunctionMode):
    """Notes the largest score matrix that an SDPA call would need, batch and heads aside."""

    scores = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            self.scores = max(self.scores, args[0].shape[-2] * args[1].shape[-2])
        return func(*args, **(kwargs or {}))


class Largest(TorchDispatchMode):
    """Notes the largest tensor that any operation returns, in numbers."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, Tensor):
                self.numbers = max(self.numbers, tensor.numel())
        return out


@pytest.mark.parametrize("official", [False, True])
@pytest.mark.parametrize("grid", [TokenGrid(1, 1, frames=1024), TokenGrid(4, 4, frames=200)], ids=str)
def test_no_tensor_holds_all_pairs_of_frames(grid: TokenGrid, official: bool) -> None:
    q, k, v = torch.randn(3, 1, 1, grid.tokens, 4)
    mechanism, context = DualScopeAttention(padding=8, top_k=16, token_num_scale=True, official=official), EARLY
    with Sizes() as sizes, Largest() as largest:
        mechanism.attend(q, k, v, grid, context=context)
    size = grid.height * grid.width
    block = max(1, 64 // size)
    most = block * size * (block + 2 * 8 + 16) * size
    assert sizes.scores == most if official else most / 2 < sizes.scores <= most
    assert largest.numbers <= 2 * max(q.numel(), sizes.scores), "inputs, output and the mask of a block"
    assert largest.numbers < grid.tokens**2 / 8


# ---- inside models


@dataclass(frozen=True, kw_only=True)
class Recorded(DualScopeAttention):
    """Notes the context and the grid of every call, and that the result is the reference's."""

    calls = []  # noqa: RUF012

    def attend(self, q: Tensor, k: Tensor, v: Tensor, grid: TokenGrid, **options: Any) -> Tensor:
        out = super().attend(q, k, v, grid, **options)
        self.calls.append((grid, options["context"].timestep, options["context"].sigma))
        options.pop("backend", None)
        assert (out - self.reference(q, k, v, grid, **options)).abs().max() < TOLERANCE[torch.float32]
        return out


@pytest.fixture
def calls() -> Iterator[list[Any]]:
    Recorded.calls.clear()
    yield Recorded.calls
    Recorded.calls.clear()


VIDEO_MODELS = ["AnimateDiff", "UNet3D", "SVD", "I2VGen-XL", "Wan", "HunyuanVideo", "LTX", "CogVideoX", "Mochi"]


in_autocast = pytest.mark.filterwarnings("ignore:In CPU autocast:UserWarning")  # Mochi's own


@in_autocast
@torch.no_grad()
@pytest.mark.parametrize("family", VIDEO_MODELS)
def test_models_are_swapped_and_restored(family: str, calls: list[Any]) -> None:
    tiny = models.BUILDERS[family]()
    own = tiny.run()
    temporal = bool(tiny.temporal)
    layout = next(iter((tiny.temporal or tiny.spatial).values()))[0]
    with diffattn.apply(
        tiny.model, Recorded(padding=0, top_k=1, local_phase=(5, 3, 0), global_phase=(5, 0, 3))
    ) as handle:
        assert {layer.kind for layer in handle.layers} == {"temporal" if temporal else "spatial"}
        for timestep in (3, 7):
            calls.clear()
            out = tiny.run(timestep=torch.full_like(tiny.inputs["timestep"], timestep))
            assert out.isfinite().all() and not torch.allclose(out, own, atol=1e-3)
            assert len(calls) % len(handle.layers) == 0  # Mochi's samples have grids of their own
            assert {time for _, time, _ in calls} == {timestep}
        grid = calls[0][0]
        assert (grid.frames, grid.height, grid.width) == (layout.frames, layout.rows, layout.columns)
        assert layout.frames > 1 and diffattn.summary(tiny.model).share < 1
    assert torch.equal(tiny.run(), own)


@torch.no_grad()
@pytest.mark.parametrize("family", ["AnimateDiff", "HunyuanVideo"])
def test_a_wide_window_leaves_a_models_output(family: str) -> None:
    tiny = models.BUILDERS[family]()
    own = tiny.run()
    with diffattn.apply(tiny.model, "dual_scope", padding=8, top_k=2, **NO_BIAS):
        torch.testing.assert_close(tiny.run(), own, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_the_largest_timestep_of_a_batch_counts(calls: list[Any]) -> None:
    tiny = models.wan()  # timesteps 7 and 3
    diffattn.apply(tiny.model, Recorded())
    tiny.run()
    assert {time for _, time, _ in calls} == {7}


def test_layers_within_a_frame_are_kept_unless_named() -> None:
    tiny = models.animatediff()
    diffattn.apply(tiny.model, "dual_scope")
    kept = {row.note for row in diffattn.summary(tiny.model).rows if not row.swapped and row.layer.endswith("attn1")}
    assert kept == {"attention within one frame: dual_scope would change nothing"}
    handle = diffattn.apply(tiny.model, "dual_scope", layers="*.attentions.*attn1")
    assert {layer.kind for layer in handle.layers} == {"spatial"}


@pytest.mark.compile
@torch.no_grad()
def test_compiled_blocks_follow_the_phase() -> None:
    tiny = models.wan()
    diffattn.apply(tiny.model, DualScopeAttention(padding=0, top_k=1, local_phase=(50, 3, 0), global_phase=(50, 0, 3)))
    times = [torch.full_like(tiny.inputs["timestep"], t) for t in (90, 70, 60, 30, 20, 10)]
    want = [tiny.run(timestep=t) for t in times]
    tiny.model.compile_repeated_blocks(fullgraph=True, backend="eager")
    torch._dynamo.utils.counters.clear()
    for t, expected in zip(times, want, strict=True):
        assert_close(tiny.run(timestep=t), expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 4, "compiled anew for each timestep"
