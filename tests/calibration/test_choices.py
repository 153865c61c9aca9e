"""The arithmetic of a calibration: which steps an output serves, what a choice costs, and the least at a price."""

import itertools
from dataclasses import replace

import numpy as np
import pytest

from diffattn import ClearAttention, RoutingAttention, TokenGrid
from diffattn.calibration.choices import Choice, Measured, cheapest, lags, plans, steps_of
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
