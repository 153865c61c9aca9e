"""Jobs on a model: one at a time, in the order they came, each of which can be cancelled.

A model's swap is a state of the model, so nothing else may use the model meanwhile: all its work is done by one thread.
"""

import logging
import threading
from collections.abc import Callable
from concurrent.futures import CancelledError, ThreadPoolExecutor
from typing import Any

logger = logging.getLogger("diffattn")

Work = Callable[["Job"], Any]


class Cancelled(Exception):
    """Raised in the work of a job that was cancelled."""


class Job:
    """Work that waits, runs or is over. Its own thread calls `tell` and `tick`; any other may read and `cancel`."""

    def __init__(self, work: Work) -> None:
        self._work, self._stop = work, threading.Event()
        self.what, self.step, self.steps = "", 0, 0
        self.notes: list[str] = []
        """What the library logged meanwhile, each line once."""
        self.future: Any = None

    @property
    def over(self) -> bool:
        return bool(self.future.done())

    @property
    def cancelled(self) -> bool:
        """Was it asked to stop?"""
        return self._stop.is_set()

    def result(self) -> Any:
        """What the work gave; raises what it raised, and `Cancelled` where it was stopped. Waits for the end."""
        try:
            return self.future.result()
        except CancelledError:
            raise Cancelled from None

    def cancel(self) -> None:
        """Leave the queue, or stop at the end of the step that runs."""
        self._stop.set()
        self.future.cancel()

    def tell(self, what: str, steps: int = 0) -> None:
        """A part of the work begins: what it is, and its steps where they are known."""
        self.check()
        self.what, self.step, self.steps = what, 0, steps

    def tick(self, step: int) -> None:
        """So many steps of the part are done."""
        self.check()
        self.step = step

    def check(self) -> None:
        """Raise `Cancelled` where the job is to stop."""
        if self.cancelled:
            raise Cancelled

    def run(self) -> Any:
        """Do the work, and keep what the library logs."""
        notes = _Notes(self.notes)
        logger.addHandler(notes)
        try:
            self.check()
            return self._work(self)
        finally:
            logger.removeHandler(notes)


class Queue:
    """Runs jobs one after the other, in a thread of its own."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="diffattn-model")
        self._lock = threading.Lock()
        self._jobs: list[Job] = []

    def submit(self, work: Work) -> Job:
        """Put work at the end; it is called with its job."""
        job = Job(work)
        with self._lock:
            self._jobs = [one for one in self._jobs if not one.over]
            job.future = self._pool.submit(self._run, job)
            self._jobs.append(job)
        return job

    def _run(self, job: Job) -> Any:
        with self._lock:  # the job has its future
            pass
        return job.run()

    def ahead(self, job: Job) -> int:
        """How many jobs come before this one."""
        with self._lock:
            waiting = [one for one in self._jobs if not one.over]
        return waiting.index(job) if job in waiting else 0

    def close(self) -> None:
        """Cancel everything, and wait until the thread is done."""
        with self._lock:
            for job in self._jobs:
                job.cancel()
        self._pool.shutdown(wait=True, cancel_futures=True)


class _Notes(logging.Handler):
    """Keeps the lines that the thread which made it logs."""

    def __init__(self, notes: list[str]) -> None:
        super().__init__(logging.WARNING)
        self._notes, self._thread = notes, threading.get_ident()

    def emit(self, record: logging.LogRecord) -> None:
        line = record.getMessage()
        if record.thread == self._thread and line not in self._notes:
            self._notes.append(line)
