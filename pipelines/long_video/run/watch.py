"""Watches over the ranks of a run: when one dies, fails or stands still, all end, and say which one and where.

Every rank puts a heartbeat into the shared store twice a second, with where it is ("step 3 of 20"). A second thread
judges what it knows of the others, and ends the process, for the main thread may hang in a collective:

    a rank says that it failed, or stopped giving signs    -> at once, or after `silence` seconds
    no rank has come further                               -> after `timeout` seconds
    SIGTERM, by which torchrun ends the rest               -> after a look at who is gone
"""

import json
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

PERIOD = 0.5
"""Seconds between two signs of life."""
SILENCE = 45.0
"""Seconds without a sign after which a rank counts as dead, unless the timeout is shorter."""
MISSED = 3.0
"""Seconds without a sign that, together with a lost connection, mean that a rank is gone."""
LINGER = 2.0
"""Seconds that a failing rank stays, for the others to read why: torchrun ends them when it goes."""
FAILED = 1


@dataclass
class Seen:
    """What is known of a rank, by this process's clock."""

    sign: int = -1
    heard: float = 0.0
    progress: int = -1
    at: str = "the start"


class Watch:
    """`with Watch(rank, size, store, timeout) as watch: ... watch.at("step 1 of 20")`."""

    def __init__(
        self,
        rank: int,
        size: int,
        store: Any,
        timeout: float,
        leave: Callable[[int], Any] = os._exit,
    ) -> None:
        self.rank, self.size, self.timeout, self.leave = rank, size, timeout, leave
        self.silence = min(SILENCE, timeout)
        self.store = None if store is None else store.clone()
        if self.store is not None:
            self.store.set_timeout(timedelta(seconds=self.silence))
        self.seen = [Seen(heard=time.monotonic()) for _ in range(size)]
        self.moved = time.monotonic()
        self.note = ""
        self._progress, self._place, self._done = 0, "the start", threading.Event()
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._signs, self._judge)]
        self._wake, self._woken = socket.socketpair()
        self._former: dict[Any, Any] = {}

    def __enter__(self) -> "Watch":
        for end in (self._wake, self._woken):
            end.setblocking(False)
        if threading.current_thread() is threading.main_thread():
            signal.set_wakeup_fd(self._woken.fileno(), warn_on_full_buffer=False)
            self._former[signal.SIGTERM] = signal.signal(signal.SIGTERM, lambda number, frame: None)
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *raised: Any) -> None:
        self._done.set()
        if self._former:
            signal.set_wakeup_fd(-1)
            for number, handler in self._former.items():
                signal.signal(number, handler)
        for thread in self._threads:
            thread.join(5)
        for end in (self._wake, self._woken):
            end.close()

    def at(self, place: str) -> None:
        """This rank has come further, and is now at `place`."""
        self._place, self._progress = place, self._progress + 1
        if self.store is None:
            self.moved = time.monotonic()

    def failed(self, error: BaseException) -> str:
        """Tell the others of an error of this rank, and say whose fault it is: another's, where one is gone."""
        if isinstance(error, RuntimeError) and self.store is not None:
            blamed = self._wait_for_blame()
            if blamed:
                self._done.set()
                return blamed
        text = f"rank {self.rank}, {self._place}: {type(error).__name__}: {' '.join(str(error).split())}"
        self._tell(text)
        self._done.set()
        if self.store is not None:
            time.sleep(LINGER)
        return text

    def _wait_for_blame(self) -> str:
        until = time.monotonic() + (0 if self.store is None else 2 * MISSED)
        while time.monotonic() < until:
            blamed = self.note or self._gone(MISSED)
            if blamed:
                return blamed
            time.sleep(PERIOD / 2)
        return ""

    def _tell(self, text: str) -> None:
        self.note = text
        if self.store is not None:
            try:
                self.store.set("failed", text)
            except RuntimeError:
                return

    def _signs(self) -> None:
        """Give signs, and read those of the others."""
        names = [f"rank-{rank}" for rank in range(self.size)]
        sign = 0
        while not self._done.wait(PERIOD) and self.store is not None:
            sign += 1
            value = json.dumps([sign, self._progress, self._place])
            try:
                self.store.set(f"rank-{self.rank}", value)
                for rank, name in enumerate(names):
                    if self.store.check([name]):
                        self._hear(rank, json.loads(self.store.get(name)))
                if not self.note and self.store.check(["failed"]):
                    self.note = self.store.get("failed").decode()
            except RuntimeError:
                time.sleep(PERIOD)  # the judge sees that nobody is heard any more

    def _hear(self, rank: int, told: list[Any]) -> None:
        seen, now = self.seen[rank], time.monotonic()
        sign, progress, place = told
        if sign != seen.sign:
            seen.sign, seen.heard = sign, now
        if progress != seen.progress:
            seen.progress, seen.at, self.moved = progress, place, now

    def _judge(self) -> None:
        """End the process when there is a reason to."""
        last = time.monotonic()
        while not self._done.is_set():
            stopped = self._asked_to_stop()
            now = time.monotonic()
            if now - last > 10 * PERIOD:  # this process itself slept: give the others time again
                self._forgive(now)
            last = now
            if stopped:
                blamed = self._wait_for_blame() or f"ended by {signal.Signals(stopped).name} in {self._place}"
                self._end(blamed, 128 + stopped)
            elif self.note:
                time.sleep(LINGER / 4)  # a main thread that raises by itself speaks for this rank
                self._end(self.note, FAILED)
            else:
                self._end(self._gone(self.silence) or self._stands(now), FAILED)

    def _end(self, reason: str, code: int) -> None:
        if reason and not self._done.is_set():
            self._tell(reason)
            sys.stderr.write(f"diffattn: error: rank {self.rank} ends: {reason}\n")
            sys.stderr.flush()
            time.sleep(LINGER)
            if not self._done.is_set():
                self.leave(code)
            self._done.set()

    def _asked_to_stop(self) -> int:
        ready, _, _ = select.select([self._wake], [], [], PERIOD)
        numbers = self._wake.recv(64) if ready else b""
        return signal.SIGTERM if signal.SIGTERM in numbers else 0

    def _forgive(self, now: float) -> None:
        self.moved = now
        for seen in self.seen:
            seen.heard = now

    def _gone(self, limit: float) -> str:
        """The ranks of which nothing was heard for `limit` seconds."""
        if self.store is None:
            return ""
        now = time.monotonic()
        silent = [rank for rank, seen in enumerate(self.seen) if now - seen.heard > limit]
        if len(silent) == self.size:
            return f"the store of the run can't be reached since {limit:.0f} s: its host, rank 0 or torchrun, is gone"
        told = [f"rank {rank} is dead or stopped, its last sign came in {self.seen[rank].at}" for rank in silent]
        return "; ".join(told)

    def _stands(self, now: float) -> str:
        if now - self.moved <= self.timeout:
            return ""
        rank = min(range(self.size), key=lambda rank: self.seen[rank].progress) if self.store is not None else 0
        at = self.seen[rank].at if self.store is not None else self._place
        return f"no progress for {self.timeout:.0f} s, rank {rank} is in {at}; where steps take longer, raise --timeout"
