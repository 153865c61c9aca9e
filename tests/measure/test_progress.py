"""How far a long work is: bars on terminals, lines elsewhere."""

import io
import logging
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from tqdm import tqdm

from diffattn.measure import progress
from diffattn.measure.progress import bar_options


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    """Seconds that tqdm and the lines read."""
    now = [0.0]
    monkeypatch.setattr(progress, "EVERY", 30.0)
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    monkeypatch.setattr(tqdm, "monitor_interval", 0)
    yield now


def work(clock: list[float], count: int, each: float, **options: Any) -> None:
    bar = tqdm(total=count, desc="images", **bar_options(**options))
    bar._time = lambda: clock[0]
    bar.start_t = bar.last_print_t = clock[0]
    for _ in range(count):
        clock[0] += each
        bar.update()
    bar.close()


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch, clock: list[float]) -> None:
    monkeypatch.setattr(sys, "stderr", Terminal())
    assert bar_options() == {"disable": False, "leave": False}
    assert bar_options(False) == {"disable": True}


def test_elsewhere_there_is_a_line_now_and_then(caplog: pytest.LogCaptureFixture, clock: list[float]) -> None:
    with caplog.at_level(logging.INFO, "diffattn.progress"):
        work(clock, 20, 10.0)
    assert [record.getMessage() for record in caplog.records] == [
        f"images: {done} of 20 after {minutes}"
        for done, minutes in ((3, "00:30"), (6, "01:00"), (9, "01:30"), (12, "02:00"), (15, "02:30"), (18, "03:00"))
    ]


def test_lines_become_seldom_in_long_work(caplog: pytest.LogCaptureFixture, clock: list[float]) -> None:
    with caplog.at_level(logging.INFO, "diffattn.progress"):
        work(clock, 36_000, 10.0)  # a hundred hours
    assert 60 < len(caplog.records) < 110


def test_short_work_says_nothing(
    caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str], clock: list[float]
) -> None:
    with caplog.at_level(logging.INFO, "diffattn.progress"):
        work(clock, 20, 1.0)
    assert not caplog.records and capsys.readouterr().err == ""


def test_who_uses_the_library_sees_lines_if_wanted_alone(
    caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str], clock: list[float]
) -> None:
    monitored = logging.getLogger("diffattn.progress")
    assert progress.logger is monitored
    before, monitored.level = monitored.level, logging.WARNING
    try:
        assert bar_options() == {"disable": True}
    finally:
        monitored.level = before
    work(clock, 20, 10.0, wanted=False)
    assert not caplog.records and capsys.readouterr().err == ""
