"""Parts of a run: `start=`, `end=`, `shares=`, and schedules of several mechanisms."""

import copy
import logging
from typing import Any

import models
import pytest
import tiny_pipelines
import torch
from hand_masks import RADIUS
from torch.nn import functional as F

import diffattn
from diffattn import ClearAttention, RoutingAttention, SoftmaxAttention, TokenGrid
from diffattn.swap.apply import commit
from diffattn.swap.plan import plan_all
from diffattn.swap.settings.placement import Placement
from diffattn.swap.settings.schedule import Part, Schedule

CLEAR = ClearAttention(radius=1)
LAYERS = 4


def swapped_steps(case: Any, **options: Any) -> list[int]:
    """The steps of a run whose attention went to the mechanism, counted where it is called."""
    steps: list[int] = []
    own = ClearAttention.attend

    def counting(self: Any, *args: Any, **kwargs: Any) -> Any:
        steps.append(case.pipe.scheduler.step_index or 0)
        return own(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch, diffattn.apply(case.pipe, CLEAR, **options):
        patch.setattr(ClearAttention, "attend", counting)
        case.run()
    return sorted(set(steps))


@pytest.mark.parametrize(
    ("total", "start", "end", "swapped"),
    [
        (4, 0.2, 1.0, [1, 2, 3]),
        (50, 0.2, 1.0, [*range(10, 50)]),
        (4, 0.2, 0.95, [1, 2, 3]),
        (50, 0.2, 0.95, [*range(10, 48)]),
        (5, 0.2, 0.8, [1, 2, 3]),
        (10, 0.0, 0.3, [0, 1, 2]),
        (1, 0.0, 0.5, [0]),
    ],
)
def test_a_share_of_the_run_fits_short_and_long_ones(total: int, start: float, end: float, swapped: list[int]) -> None:
    case = tiny_pipelines.flux(steps=total)
    assert swapped_steps(case, start=start, end=end) == swapped


def test_the_other_steps_are_the_models_own() -> None:
    case = tiny_pipelines.flux(steps=5)
    with diffattn.apply(case.pipe, CLEAR, steps=slice(1, 4)):
        want = case.run()
    with diffattn.apply(case.pipe, CLEAR, start=0.2, end=0.8):
        got = case.run()
        assert diffattn.summary(case.pipe).calls == {
            "swapped": 3 * LAYERS,
            "dense in steps before start= and from end= on": 2 * LAYERS,
        }
    assert torch.equal(got, want)


def test_a_part_that_no_step_is_in_is_told(caplog: pytest.LogCaptureFixture) -> None:
    case = tiny_pipelines.flux(steps=2)
    own = case.run()
    with caplog.at_level(logging.WARNING, logger="diffattn"), diffattn.apply(case.pipe, CLEAR, start=0.6):
        assert torch.equal(case.run(), own)
    assert caplog.text.count("start= and end= pick none of the 2 steps of this run") == 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"start": 0.5, "end": 0.5}, "start= before end="),
        ({"start": -0.1}, "a share of the schedule from 0 to 1"),
        ({"end": 20}, "a share of the schedule from 0 to 1"),
        ({"start": "0.2"}, "start"),
        ({"start": 0.2, "steps": slice(1, None)}, "give one of the two"),
        ({"shares": (0.5, 0.3)}, "clear has no share"),
        ({"shares": 0.5}, "shares"),
        ({"shares": (0.0,)}, "above 0 and at most 1"),
    ],
)
def test_wrong_parts_are_refused_and_change_nothing(options: dict[str, Any], words: str) -> None:
    case = tiny_pipelines.flux(steps=2)
    own = case.run()
    with pytest.raises(ValueError, match=words):
        diffattn.apply(case.pipe, CLEAR, **options)
    assert torch.equal(case.run(), own)


@pytest.mark.parametrize("options", [{"start": 0.2}, {"end": 0.9}, {"shares": (0.5,), "mechanism": "routing"}])
def test_a_model_by_itself_has_no_run(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="counts the steps of a pipeline"):
        diffattn.apply(models.flux().model, options.pop("mechanism", CLEAR), **options)


# --- schedules


def test_parts_hold_the_steps_before_their_end() -> None:
    schedule = Schedule((Part(SoftmaxAttention(), until=1 / 3), Part(CLEAR, 2, until=2 / 3), Part(CLEAR)))
    for total in (3, 6, 7, 9, 50):
        parts = [schedule.number(step / total) for step in range(total)]
        assert parts == [min(3 * step // total, 2) for step in range(total)]
    assert schedule.number(None) == 1 and schedule.main.reuse == 2 and schedule.reuse == 2
    assert schedule.mechanisms == (CLEAR,) and schedule.needs == {"progress", "memory"}
    assert str(schedule) == "full to 33%; clear(radius=1), reuse 2 to 67%; clear(radius=1) to 100%"


def test_shares_come_one_after_the_other() -> None:
    case = tiny_pipelines.flux(steps=6)
    seen: list[float] = []
    own = RoutingAttention.attend

    def counting(self: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(self.share)
        return own(self, *args, **kwargs)

    options = {"tile": 2, "pool": 2, "start": 0.3, "shares": (0.9, 0.8)}
    with pytest.MonkeyPatch.context() as patch, diffattn.apply(case.pipe, "routing", **options):
        patch.setattr(RoutingAttention, "attend", counting)
        case.run()
    assert seen == [0.9] * 2 * LAYERS + [0.8] * 2 * LAYERS  # steps 2 and 3, then 4 and 5


def put(case: Any, schedule: Schedule, **placement: Any) -> Any:
    return commit(plan_all(case.pipe, schedule, Placement(**placement)))


def test_every_step_has_the_attention_of_its_part() -> None:
    """Against the same steps made one by one under each mechanism alone, by hand-made masks."""
    case = tiny_pipelines.flux(steps=4)
    outputs: list[torch.Tensor] = []
    case.pipe.transformer.register_forward_hook(
        lambda module, args, kwargs, out: outputs.append(out[0]), with_kwargs=True
    )
    inputs: list[dict[str, Any]] = []
    case.pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: inputs.append(kwargs), with_kwargs=True
    )
    wide = ClearAttention(radius=RADIUS)
    schedule = Schedule((Part(CLEAR, until=0.25), Part(SoftmaxAttention(), until=0.5), Part(wide)))
    with put(case, schedule):
        case.run()
        calls = diffattn.summary(case.pipe).calls
    assert calls == {
        "swapped": 3 * LAYERS,
        "dense in the parts of the run that its schedule leaves full": LAYERS,
    }
    ran = [*zip(inputs[:4], outputs[:4], strict=True)]
    for mechanism, (given, out) in zip((CLEAR, None, wide, wide), ran, strict=True):
        if mechanism is None:
            again = case.pipe.transformer(**given)[0]
        else:
            with diffattn.apply(case.pipe.transformer, mechanism):
                again = case.pipe.transformer(**given)[0]
        torch.testing.assert_close(again, out)


def test_outputs_are_kept_within_a_part_alone() -> None:
    case = tiny_pipelines.flux(steps=6)
    schedule = Schedule((Part(CLEAR, 3, until=0.5), Part(SoftmaxAttention(), 2)))
    with put(case, schedule):
        case.run()
        calls = diffattn.summary(case.pipe).calls
    # computed: 0 of the first three; 3 and 5 of the others
    assert calls == {"swapped": 3 * LAYERS, "with the output of an earlier step": 3 * LAYERS}


def test_computed_counts_each_part_by_its_own_mechanism() -> None:
    case = tiny_pipelines.flux(steps=2)
    with put(case, Schedule((Part(CLEAR, until=0.5), Part(ClearAttention(radius=2))))):
        case.run()
        computed = diffattn.summary(case.pipe).computed
    grid = TokenGrid(4, 6, before=models.TEXT)
    shares = [float(ClearAttention(radius=radius).mask(grid).float().mean()) for radius in (1, 2)]
    assert computed == pytest.approx(sum(shares) / 2)


def test_a_copy_has_the_schedule_too() -> None:
    case = tiny_pipelines.flux(steps=4)
    handle = put(case, Schedule((Part(CLEAR, until=0.5), Part(SoftmaxAttention()))))
    want = case.run()
    other = copy.deepcopy(case.pipe)
    case.pipe = other
    assert torch.equal(case.run(), want)
    handle.restore()


@pytest.mark.slow
def test_compiled_models_follow_the_schedule() -> None:
    case = tiny_pipelines.flux(steps=4)
    schedule = Schedule((Part(CLEAR, until=0.5), Part(SoftmaxAttention(), until=0.75), Part(ClearAttention(radius=2))))
    with put(case, schedule):
        want = case.run()
        case.pipe.transformer.compile(backend="eager")
        got = case.run()
        calls = diffattn.summary(case.pipe).calls
    torch.testing.assert_close(got, want)
    assert calls["swapped"] == 3 * LAYERS


def test_weights_go_with_one_kind_of_mechanism() -> None:
    case = tiny_pipelines.flux(steps=2)
    parts = Part(diffattn.LinearAttention(feature_map="learned"), until=0.5), Part(CLEAR)
    with pytest.raises(ValueError, match="weights of its own"):
        put(case, Schedule(parts))


def test_distance_to_the_models_own_falls_with_the_part_that_is_full() -> None:
    case = tiny_pipelines.flux(steps=10)
    own = case.run()
    errors = []
    for start in (0.0, 0.5, 0.9):
        with diffattn.apply(case.pipe, CLEAR, start=start):
            errors.append(float(F.mse_loss(case.run(), own)))
    assert errors[0] > errors[1] > errors[2] > 0
