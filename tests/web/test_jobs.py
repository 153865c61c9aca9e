"""Jobs on a model: in turn, and stopped at any time."""

import logging
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from diffattn.web.jobs import Cancelled, Job, Queue


@pytest.fixture
def queue() -> Iterator[Queue]:
    queue = Queue()
    yield queue
    queue.close()


def held(gate: threading.Event, begun: threading.Event | None = None) -> Any:
    """Work that waits for `gate`, and then makes a step."""

    def work(job: Job) -> str:
        job.tell("holding", 2)
        if begun is not None:
            begun.set()
        assert gate.wait(30)
        job.tick(1)
        return "held"

    return work


def test_jobs_run_one_at_a_time_in_their_order(queue: Queue) -> None:
    running, most, order = [], [], []

    def work(name: int) -> Any:
        def run(job: Job) -> int:
            running.append(name)
            most.append(len(running))
            order.append(name)
            running.remove(name)
            return name

        return run

    jobs = [queue.submit(work(number)) for number in range(20)]
    assert [job.result() for job in jobs] == order == list(range(20))
    assert max(most) == 1


def test_a_job_knows_how_many_come_first(queue: Queue) -> None:
    gate = threading.Event()
    jobs = [queue.submit(held(gate)) for _ in range(3)]
    assert [queue.ahead(job) for job in jobs] == [0, 1, 2]
    jobs[1].cancel()
    assert queue.ahead(jobs[2]) == 1
    gate.set()
    assert jobs[2].result() == "held"
    assert queue.ahead(jobs[2]) == 0


def test_a_cancelled_job_stops_at_its_next_step_and_frees_the_queue(queue: Queue) -> None:
    gate, begun = threading.Event(), threading.Event()
    job, after = queue.submit(held(gate, begun)), queue.submit(lambda job: "free")
    assert begun.wait(30)
    job.cancel()
    assert not job.over
    gate.set()
    with pytest.raises(Cancelled):
        job.result()
    assert after.result() == "free"


def test_a_job_cancelled_while_it_waits_is_never_begun(queue: Queue) -> None:
    gate, ran = threading.Event(), []
    first, second = queue.submit(held(gate)), queue.submit(ran.append)
    second.cancel()
    assert second.over
    with pytest.raises(Cancelled):
        second.result()
    gate.set()
    first.result()
    assert ran == []


def test_an_error_is_the_jobs_own(queue: Queue) -> None:
    def wrong(job: Job) -> None:
        raise ValueError("no such thing")

    with pytest.raises(ValueError, match="no such thing"):
        queue.submit(wrong).result()
    assert queue.submit(lambda job: 1).result() == 1


def test_a_job_keeps_what_the_library_logs_in_its_thread(queue: Queue) -> None:
    gate, begun = threading.Event(), threading.Event()
    logger = logging.getLogger("diffattn")

    def work(job: Job) -> None:
        for _ in range(2):
            logger.warning("expect %s", "other images")
        begun.set()
        assert gate.wait(30)

    job = queue.submit(work)
    assert begun.wait(30)
    logger.warning("of another thread")
    gate.set()
    job.result()
    assert job.notes == ["expect other images"]
    handlers = len(logger.handlers)
    queue.submit(lambda job: None).result()
    assert len(logger.handlers) == handlers


def test_closing_cancels_what_runs() -> None:
    queue, begun = Queue(), threading.Event()

    def endless(job: Job) -> None:
        begun.set()
        while True:
            job.check()

    job = queue.submit(endless)
    assert begun.wait(30)
    queue.close()
    assert job.over and job.cancelled
