"""What tabs share: the text of a setting, errors as a line, and a job from its start to its end."""

import asyncio
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from diffattn.comparison import Setting
from diffattn.web.jobs import Queue
from diffattn.web.models import Wish
from diffattn.web.tabs.parts import follow, options_of, said, setting_text, wish_of

pytest.importorskip("gradio", reason='gradio is missing: pip install "diffattn[web]"')


@pytest.fixture
def queue() -> Iterator[Queue]:
    queue = Queue()
    yield queue
    queue.close()


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        (("full", "", "", 0, 1, ""), "full"),
        (("full", None, "", None, None, None), "full"),
        (("clear", "  radius=4   pool=2 ", "", 0, 1, " "), "clear radius=4 pool=2"),
        (("routing", "", "fast", 0.25, 2, "*.attn "), "routing quality=fast start=0.25 reuse=2 layers=*.attn"),
    ],
)
def test_fields_say_what_the_library_reads(fields: tuple[Any, ...], text: str) -> None:
    assert setting_text(*fields) == text
    assert Setting.parse(text).name == text


def test_fields_that_are_wrong_are_refused_by_the_library() -> None:
    for fields, words in (
        (("clear", "radius=4", "", 0, 0, ""), "reuse must be"),
        (("clear", "radius=4", "fast", 0, 1, ""), "quality"),
        (("full", "radius=4", "", 0, 1, ""), "full has no options"),
    ):
        with pytest.raises(ValueError, match=words):
            setting = Setting.parse(setting_text(*fields))
            assert setting.meaning


def test_options_are_those_of_the_mechanism() -> None:
    assert "`radius=required`" in options_of("clear")
    assert "no options" in options_of("full")


def test_an_empty_field_is_left_to_the_pipeline() -> None:
    assert wish_of(["prompt", "seed", "steps", "height"], ["", None, 0, 64]) == Wish(prompt="", height=64)


def test_an_error_is_one_line_and_a_bug_says_so(caplog: pytest.LogCaptureFixture) -> None:
    assert said(ValueError("expected this,\n got that")) == "expected this, got that"
    assert said(MemoryError()) == "MemoryError"
    assert not caplog.records
    assert said(KeyError("x")) == "KeyError: 'x'; this is a bug of diffattn, and the terminal shows where"
    assert caplog.records[0].exc_info is not None


def told(queue: Queue, work: Any, shown: Any = lambda found: (found,)) -> list[tuple[Any, ...]]:
    """All that `follow` yields."""

    async def run() -> list[tuple[Any, ...]]:
        return [values async for values in follow(queue, lambda: work, shown)]

    return asyncio.run(run())


def test_a_result_ends_what_is_told(queue: Queue) -> None:
    first, *_, last = told(queue, lambda job: "<p>done</p>")
    assert first[0] is not None and first[1]["interactive"] and first[3] == ""
    assert last[0] is None and not last[1]["interactive"] and last[2:] == ("", "", "<p>done</p>")


def test_an_error_takes_the_place_of_the_result(queue: Queue) -> None:
    def wrong(job: Any) -> None:
        raise ValueError("no <such> thing")

    last = told(queue, wrong)[-1]
    assert 'role="alert"' in last[3] and "no &lt;such&gt; thing" in last[3] and last[4] == ""


def test_what_is_wrong_before_the_work_never_enters_the_queue(queue: Queue) -> None:
    def prepare() -> Any:
        raise ValueError("wrong input")

    async def run() -> list[Any]:
        return [values async for values in follow(queue, prepare, lambda found: (found,), extra=2)]

    [only] = asyncio.run(run())
    assert "wrong input" in only[3] and len(only) == 7


def test_a_cancelled_job_says_after_which_step(queue: Queue) -> None:
    def work(job: Any) -> None:
        job.tell("drawing", 9)
        job.tick(4)
        job.cancel()
        job.check()

    assert "Cancelled after step 4 of 9. The model is as it was." in told(queue, work)[-1][2]


def test_a_visitor_who_leaves_cancels_the_job(queue: Queue) -> None:
    begun, stopped = threading.Event(), threading.Event()

    def endless(job: Any) -> None:
        begun.set()
        try:
            while True:
                job.check()
        finally:
            stopped.set()

    async def leave() -> None:
        values = follow(queue, lambda: endless, lambda found: (found,))
        await anext(values)
        assert await asyncio.to_thread(begun.wait, 30)
        await values.aclose()  # type: ignore[attr-defined]

    asyncio.run(leave())
    assert stopped.wait(30)


def test_whoever_waits_is_told_how_many_come_first(queue: Queue) -> None:
    gate = threading.Event()
    queue.submit(lambda job: gate.wait(30))

    async def run() -> str:
        async for values in follow(queue, lambda: lambda job: "", lambda found: (found,)):
            gate.set()
            return str(values[2])
        return ""

    assert "Waiting: 1 job on this model comes first." in asyncio.run(run())
