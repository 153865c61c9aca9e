"""The arithmetic of a calibration: which steps an output serves, what a choice costs, and the least at a price."""

import itertools
from dataclasses import replace

import numpy as np
import pytest

from diffattn import ClearAttention, RoutingAttention, TokenGrid
from diffattn.calibration.calibrate import cheapest_reaching, nearest_within
from diffattn.calibration.choices import (
    Choice,
    Measured,
    Plan,
    cheapest,
    lags,
    plans,
    rows_of_plans,
    steps_of,
    uniform,
)
from diffattn.calibration.probing import Errors
from diffattn.swap.settings.schedule import FULL

GRID = TokenGrid(8, 8)
NEAR, FAR = RoutingAttention(share=0.6, tile=2, pool=2), ClearAttention(radius=1, pool=2)


def measured(layers: int = 2, steps: int = 6, seed: int = 0) -> Measured:
    rng = np.random.default_rng(seed)
    own = rng.random((layers, 2, steps)) * np.array([0.1, 1.0])[None, :, None]
    names = tuple(f"blocks.{layer}.attn" for layer in range(layers))
    heads = ((2, 16),) * layers
    return Measured(names, (GRID,) * layers, heads, (NEAR, FAR), own, rng.random((layers, 2, steps)))


@pytest.mark.parametrize(
    ("steps", "reuse", "want"),
    [
        ([0, 1, 2, 3], 1, [0, 0, 0, 0]),
        ([0, 1, 2, 3], 2, [0, 1, 0, 1]),
        ([4, 5, 6], 3, [0, 1, 2]),
        ([6, 7, 8, 9], 4, [0, 1, 2, 0]),  # 9 is the last of the run
    ],
)
def test_outputs_serve_within_their_part(steps: list[int], reuse: int, want: list[int]) -> None:
    assert [lag for _, lag in lags(steps, reuse, total=10)] == want


@pytest.mark.parametrize("total", [1, 2, 3, 7, 50])
def test_parts_share_the_steps(total: int) -> None:
    parts = steps_of(3, total)
    assert list(itertools.chain(*parts)) == list(range(total))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_error_and_pairs_of_a_choice_by_hand() -> None:
    found = measured()
    error = found.error(1, Choice(FAR, 2), [2, 3, 4, 5])
    want = found.own[1, 1, [2, 2, 4, 5]].sum() + found.stale[1, 0, 3]  # 5 is the last, and computed
    assert error == pytest.approx(want)
    assert found.pairs(1, Choice(FAR, 2), [2, 3, 4, 5]) == 3 * FAR.flops(GRID, 2, 16)
    assert found.error(0, Choice(FULL), [0, 1]) == 0


@pytest.mark.parametrize("price", [1e-3, 0.3, 10.0])
def test_no_other_plan_is_cheaper(price: float) -> None:
    found, choices = measured(layers=2, steps=4), [Choice(FULL), Choice(NEAR), Choice(NEAR, 2), Choice(FAR)]
    plan = cheapest(found, choices, 2, price)
    parts, places = steps_of(2, 4), [(layer, part) for layer in range(2) for part in range(2)]
    full = sum(found.pairs(layer, Choice(FULL), steps) for layer in range(2) for steps in parts)

    def cost(rows: tuple[Choice, ...]) -> float:
        every = list(zip(places, rows, strict=True))
        error = sum(found.error(layer, own, parts[part]) for (layer, part), own in every)
        return error + price * sum(found.pairs(layer, own, parts[part]) for (layer, part), own in every) / full

    best = min(map(cost, itertools.product(choices, repeat=len(places))))
    assert plan.error + price * plan.share == pytest.approx(best)


def test_plans_go_from_full_to_the_cheapest() -> None:
    found, choices = measured(), [Choice(FULL), Choice(NEAR), Choice(FAR), Choice(FAR, 3)]
    ordered = plans(found, choices, 3)
    shares, errors = [plan.share for plan in ordered], [plan.error for plan in ordered]
    assert shares[0] == pytest.approx(1) and errors[0] == 0 and shares == sorted(shares, reverse=True)
    assert errors == sorted(errors) and len(ordered) > 5
    assert ordered[0].schedules(found) == {}
    schedules = ordered[-1].schedules(found)
    assert [part.until for part in schedules["blocks.0.attn"].parts] == [1 / 3, 2 / 3, 1.0]
    late = replace(found, skipped=found.steps)  # image to image at strength 0.5
    [first, *_] = ordered[-1].schedules(late).values()
    assert [part.until for part in first.parts] == [4 / 6, 5 / 6, 1.0]


def test_one_choice_for_all_costs_what_its_mechanism_costs() -> None:
    found = measured()
    full, near, late = uniform(found, [Choice(NEAR, 2), Choice(FULL), Choice(NEAR)])
    share = NEAR.flops(GRID, 2, 16) / (4 * GRID.tokens**2 * 2 * 16)
    assert [plan.share for plan in (full, near, late)] == pytest.approx(
        [1, share, share * 4 / 6]
    )  # 0, 2, 4 and the last
    assert late.choices == ((Choice(NEAR, 2),),) * 2


def test_where_old_outputs_count_less_more_is_kept() -> None:
    found, choices = measured(), [Choice(FULL), Choice(NEAR), Choice(FULL, 2)]

    def kept(stale: float) -> int:
        plan = cheapest(found, choices, 3, 1.0, stale)
        return sum(choice.reuse > 1 for row in plan.choices for choice in row)

    assert kept(1e-6) > kept(1.0) >= 0


def test_rows_are_by_weight_and_by_choice_each_from_dear_to_cheap() -> None:
    choices = [Choice(FULL), Choice(NEAR), Choice(NEAR, 2), Choice(FAR), Choice(FULL, 2)]
    rows = rows_of_plans(measured(), choices, 3)
    assert [len(row) for row in rows[3:]] == [1, 1, 1, 1, 1]
    for row in rows:
        assert [plan.share for plan in row] == sorted((plan.share for plan in row), reverse=True)


def plan(share: float, name: int = 0) -> Plan:
    return Plan(((Choice(FULL, name + 1),),), share, 0.0)


def test_within_a_budget_the_best_in_the_mean_of_the_rows() -> None:
    rows = [[plan(1.0), plan(0.5, 1), plan(0.2, 2)], [plan(0.7, 3), plan(0.4, 4)], [plan(0.9, 5)]]
    seen = {1: [30.0, 36.0], 4: [34.0, 33.0]}  # the dearest of the rows within 0.6; the third has none
    assert nearest_within(rows, lambda one: seen[one.choices[0][0].reuse - 1], 0.6).share == 0.4
    with pytest.raises(ValueError, match="the cheapest choices take 20.0%"):
        nearest_within(rows, lambda one: [0.0], 0.1)


def test_a_fidelity_is_reached_by_the_cheapest_of_all_rows() -> None:
    first = [plan(share, number) for number, share in enumerate((1.0, 0.8, 0.6, 0.4, 0.3))]
    other = [plan(share, 5 + number) for number, share in enumerate((0.7, 0.5, 0.35, 0.1))]
    tried: list[float] = []

    def psnr(one: Plan) -> list[float]:
        tried.append(one.share)
        return [100 * one.share + (10 if one.choices[0][0].reuse > 5 else 0)] * 3

    assert cheapest_reaching([first, other], psnr, 40).share == 0.35
    assert cheapest_reaching([other, first], psnr, 40).share == 0.35
    assert cheapest_reaching([first], psnr, 200).share == 1.0
    assert len(tried) <= 15


def test_prompts_are_weighed_by_their_own_sum() -> None:
    own, stale = np.full((1, 2, 2), 3.0), np.full((1, 1, 2), 2.0)
    small = Errors(own, stale, [1.0, 0.5]).relative()
    large = Errors(own * 1e4, stale * 1e4, [1.0, 0.5]).relative()
    np.testing.assert_allclose(small.own, large.own)
    assert small.own.sum() + small.stale.sum() == pytest.approx(1)
