"""One knob: levels by name, what is given beside them, and what is refused."""

from typing import Any

import pytest
import tiny_pipelines

import diffattn
from diffattn import RoutingAttention, TokenGrid
from diffattn.swap.settings.quality import LEVELS


def what_is_put(**options: Any) -> tuple[RoutingAttention, int]:
    """Mechanism and reuse."""
    handle = diffattn.apply(tiny_pipelines.flux(steps=2).pipe, "routing", **options)
    schedule = handle.layers[0].schedule
    return schedule.main.mechanism, schedule.main.reuse  # type: ignore[return-value]


@pytest.mark.parametrize("quality", LEVELS["routing"])
def test_a_level_is_its_options(quality: str) -> None:
    level = LEVELS["routing"][quality]
    mechanism, reuse = what_is_put(quality=quality)
    assert mechanism == RoutingAttention(**level.options) and reuse == level.placement.get("reuse", 1)


def test_what_is_given_beside_a_level_counts() -> None:
    mechanism, reuse = what_is_put(quality="fast", reuse=1, top_share=0.5)
    assert mechanism.top_share == 0.5 and reuse == 1
    assert mechanism.blocks == LEVELS["routing"]["fast"].options["blocks"]
    mechanism, _ = what_is_put(quality="fast", share=0.9)
    assert mechanism.share == 0.9 and mechanism.top_share is None
    mechanism, _ = what_is_put(quality="fast", pool=2)
    assert mechanism.pool == 2 and mechanism.blocks is None


def calls_of(total: int, **options: Any) -> dict[str, int]:
    """What the layers did in a run."""
    case = tiny_pipelines.flux(steps=total)
    with diffattn.apply(case.pipe, "routing", **options):
        case.run()
        return dict(diffattn.summary(case.pipe).calls)


def test_a_level_leaves_the_first_steps_full() -> None:
    full = "dense in steps before start= and from end= on"
    every = sum(calls_of(5, quality="high").values())
    assert calls_of(5, quality="high")[full] == every // 5
    assert full not in calls_of(5, quality="high", start=0)
    assert calls_of(5, quality="high", start=0.5)[full] == every * 3 // 5
    assert calls_of(5, quality="high", steps=slice(0, 1))["dense in steps that steps= leaves out"] == every * 4 // 5


def test_levels_compute_less_and_less_at_every_size() -> None:
    for grid in (TokenGrid(32, 32, before=512), TokenGrid(64, 64, before=512), TokenGrid(45, 80, frames=21)):
        work = []
        for level in LEVELS["routing"].values():
            reuse = level.placement.get("reuse", 1)
            work.append(RoutingAttention(**level.options).flops(grid, 24, 128) / reuse)
        assert work == sorted(work, reverse=True)


@pytest.mark.parametrize(
    ("mechanism", "quality", "words"),
    [
        ("clear", "fast", "with a mechanism by its short name, one of routing; got 'clear'"),
        (RoutingAttention(), "fast", "by its short name"),
        ("routing", "best", "quality= of high, balanced, fast; got 'best'"),
        ("routing", 3, "quality= of high"),
    ],
)
def test_unknown_levels_are_refused(mechanism: Any, quality: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        diffattn.apply(tiny_pipelines.flux(steps=2).pipe, mechanism, quality=quality)
