"""Who holds which frames, and what is refused."""

from typing import Any

import models
import pytest
from clip_splits import SPLITS
from parallel_ranks import on_ranks
from torch.distributed.device_mesh import DeviceMesh

from diffattn.parallel.frames import _say_other_video, apply_on_clips
from diffattn.parallel.operations.shares import FramePlan, Traffic


@pytest.mark.parametrize("lengths", SPLITS, ids=str)
def test_clips_cover_the_video_in_order(lengths: tuple[int, ...]) -> None:
    plans = [FramePlan(lengths, rank) for rank in range(len(lengths))]
    frames = [frame for plan in plans for frame in plan.own]
    assert frames == list(range(sum(lengths))) == list(range(plans[0].frames))
    for plan in plans:
        assert len(plan.own) == plan.length
        assert [plans[0].owner(frame) for frame in plan.own] == [plan.rank] * plan.length
        assert plan.clip(plan.rank) == plan.own


def test_a_window_ends_with_the_video() -> None:
    plan = FramePlan((5, 2, 5), rank=1)
    assert plan.window(0, 0) == plan.own == range(5, 7)
    assert plan.window(3, 1) == range(2, 8)
    assert plan.window(50, 50) == range(12)
    assert plan.window(1, 1, rank=2) == range(6, 12)


def test_an_even_split_gives_the_longer_clips_first() -> None:
    assert FramePlan.split(7).lengths == (7,)
    assert on_ranks(3, even_split, 8) == [(3, 3, 2)] * 3


def even_split(mesh: DeviceMesh, frames: int) -> tuple[int, ...]:
    return FramePlan.split(frames, mesh).lengths


@pytest.mark.parametrize(
    ("lengths", "message"), [((), "at least one frame"), ((3, 0), "at least one frame"), ((3, True), "at least one")]
)
def test_a_plan_refuses_empty_clips(lengths: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FramePlan(lengths)


def test_a_plan_refuses_a_rank_without_a_clip_and_a_frame_beyond_the_end() -> None:
    with pytest.raises(ValueError, match="one of the 2"):
        FramePlan((1, 2), rank=2)
    with pytest.raises(ValueError, match="0 to 2, got 3"):
        FramePlan((1, 2)).owner(3)
    with pytest.raises(ValueError, match="2 clips need a process group"):
        FramePlan((1, 2)).agree("a thing", 1)
    with pytest.raises(ValueError, match="clip of 1 frames, got 2"):
        FramePlan((1, 2)).check(2)


def refusal(mesh: DeviceMesh, frames: list[int], lengths: list[list[int] | None]) -> str:
    rank = mesh.get_local_rank()
    try:
        FramePlan.split(frames[rank], mesh, lengths[rank])
    except ValueError as error:
        return str(error)
    return "accepted"


@pytest.mark.dist
@pytest.mark.parametrize(
    ("frames", "lengths", "message"),
    [
        ([1, 1], [None, None], "1 frames can't be split among 2 ranks"),
        ([6, 6], [[3, 4], [3, 4]], r"6 frames in all, got [3, 4] with 7 frames"),
        ([6, 6], [[6], [6]], r"for each of 2 ranks, 6 frames in all, got [6]"),
        ([6, 6], [[6, 0], [6, 0]], "at least one frame"),
        ([6, 6], [[2, 4], [4, 2]], "rank 0 has (2, 4), rank 1 has (4, 2)"),
        ([6, 8], [None, None], "the ranks disagree on the split of the frames"),
        ([6, 6], [[2, 4], [2, 5]], "rank 1: lengths must name|with 7 frames"),
    ],
)
def test_every_rank_refuses_a_wrong_split(frames: list[int], lengths: list[list[int] | None], message: str) -> None:
    for told in on_ranks(2, refusal, frames, lengths):
        assert any(part in told for part in message.split("|")), told


@pytest.mark.dist
def test_a_rank_names_only_others_in_an_error() -> None:
    own = on_ranks(2, refusal, [1, 1], [None, None])
    assert all(text.startswith("1 frames can't be split") for text in own), own
    first, second = on_ranks(2, refusal, [6, 6], [[2, 4], [2, 5]])
    assert first.startswith("rank 1: lengths must name") and second.startswith("lengths must name")


def test_a_coarser_plan_has_the_same_clips_in_patches() -> None:
    plan = FramePlan((6, 2, 4), rank=2, group="ranks")
    coarser = plan.coarser(2)
    assert (coarser.lengths, coarser.rank, coarser.group) == ((3, 1, 2), 2, "ranks")
    assert [frame // 2 for frame in plan.own[::2]] == list(coarser.own)
    coarser.traffic.count("halo", 3, 4)
    assert plan.traffic.sent == {"halo": 3}
    assert plan.coarser(1) == plan
    with pytest.raises(ValueError, match=r"multiples of 3 frames, got \(6, 2, 4\); pass lengths="):
        plan.coarser(3)


def told(caplog: pytest.LogCaptureFixture, **options: Any) -> list[str]:
    """The warnings of a model on clips: a window that leaves frames out gives another video, and says so."""
    _say_other_video.cache_clear()
    caplog.clear()
    with apply_on_clips(models.unet3d().model, FramePlan((5,)), "dual_scope", **options):
        return [
            record.getMessage()
            for record in caplog.records
            if record.name == "diffattn" and record.levelname == "WARNING"
        ]


def test_a_window_over_everything_promises_no_other_video(caplog: pytest.LogCaptureFixture) -> None:
    assert told(caplog, padding=4, top_k=0) == []
    assert told(caplog, padding=5, top_k=0, local_phase=None, global_phase=None) == []
    for options in (
        {"padding": 3, "top_k": 0},
        {"padding": 4, "top_k": 2},
        {"padding": 4, "top_k": 0, "attn_scale": 2},
    ):
        (line,) = told(caplog, **options)
        assert f"see {options['padding']} on either side and {options['top_k']} of the whole video" in line
    (line,) = told(caplog, padding=4, top_k=0, mode="official")
    assert "expect another video" in line and "steps=" not in line


def test_traffic_adds_up() -> None:
    traffic = Traffic()
    traffic.count("halo", 3, 4)
    traffic.count("halo", 1, 1)
    traffic.count("norm", 2, 2)
    assert (traffic.sent, traffic.received) == ({"halo": 4, "norm": 2}, {"halo": 5, "norm": 2})
    assert traffic.calls == {"halo": 2, "norm": 1}
    traffic.reset()
    assert traffic == Traffic()
