"""Charts: where points lie, and what is told of them."""

import re
from typing import Any

import numpy as np
import pytest

from diffattn.comparison import Comparison, Row
from diffattn.web import charts
from diffattn.web.charts import Axis


def comparison(**settings: tuple[float, float]) -> Comparison:
    """Name -> seconds and PSNR; full attention takes 4 s."""
    rows = [Row("full", 0, 4.0, None, 1.0, 120.0, 120.0, None, None, None)]
    rows += [Row(name, 0, s, None, 0.5, psnr, psnr, None, None, None) for name, (s, psnr) in settings.items()]
    return Comparison(tuple(row.setting for row in rows), tuple(rows), {}, {}, lambda *_: np.zeros((1, 1, 3)))


def places(text: str) -> dict[str, tuple[float, float]]:
    found = re.findall(r'data-setting="([^"]+)".*?r="14"/><circle cx="([\d.]+)" cy="([\d.]+)"', text)
    return {name: (float(x), float(y)) for name, x, y in found}


def test_faster_is_right_and_nearer_is_up() -> None:
    text = charts.frontier(comparison(near=(2.0, 40.0), fast=(1.0, 20.0), poor=(3.0, 15.0)), "fast")
    found = places(text)
    assert found["poor"][0] < found["near"][0] < found["fast"][0]
    assert found["near"][1] < found["fast"][1] < found["poor"][1]
    assert text.count("da-point da-on") == 2 and text.count("da-chosen") == 1
    assert 'aria-label="near: 2.00 times as fast, 40.0 dB, on the frontier"' in text
    assert text.count('tabindex="0"') == 3


def test_names_are_escaped_and_nothing_is_drawn_of_nothing() -> None:
    assert "<b>" not in charts.frontier(comparison(**{"<b>": (1.0, 3.0)}), "")
    assert charts.frontier(comparison(), "") == charts.losses([]) == ""


@pytest.mark.parametrize("values", [[1.0], [0.0, 1e-5], [3.0, 900.0], [1.0, 1.0]])
def test_ticks_are_round_few_and_inside(values: list[float]) -> None:
    axis = Axis(values, 0, 100)
    assert 1 <= len(axis.ticks) <= 7
    assert all(0 <= axis(tick) <= 100 for tick in axis.ticks)


def test_a_logarithmic_axis_has_decades() -> None:
    axis = Axis([1e-4, 1.0], 0, 100, log=True)
    np.testing.assert_allclose(axis.ticks, [1e-4, 1e-3, 1e-2, 1e-1, 1.0])
    assert axis(1e-2) == pytest.approx(50)
    assert len(Axis([0.2, 0.3], 0, 100, log=True).ticks) >= 1


def test_losses_are_lines_and_what_is_no_number_is_left_out() -> None:
    rows: list[dict[str, Any]] = [{"step": step, "total": 1 / step, "target": 0.0} for step in (1, 2, 4)]
    rows[1]["total"] = float("nan")
    text = charts.losses(rows)
    assert text.count("<polyline") == 1
    assert "total 0.25" in text and "target" not in text and "nan" not in text
