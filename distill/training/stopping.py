"""A run that is told to stop ends after the step it is at."""

import contextlib
import logging
import signal
from collections.abc import Iterator
from typing import Any

logger = logging.getLogger("diffattn")


class Stop:
    """Whether the process was told to stop."""

    asked = False


@contextlib.contextmanager
def told_to_stop() -> Iterator[Stop]:
    """Inside the block SIGTERM sets `asked` instead of ending the process."""
    stop = Stop()

    def listen(number: int, frame: Any) -> None:
        stop.asked = True
        logger.warning("told to stop: the run ends after this step, with a checkpoint")

    try:
        former = signal.signal(signal.SIGTERM, listen)
    except ValueError:  # not the main thread
        yield stop
        return
    try:
        yield stop
    finally:
        signal.signal(signal.SIGTERM, former)
