"""How far a long job is: a bar on a terminal; elsewhere a line now and then, in the log.

The lines are those of the logger `diffattn.progress`, at the level INFO: the command line writes them, and who uses the
library sees them by `logging`. The first comes after half a minute, and later ones less and less often.
"""

import logging
import sys
import time
from typing import Any

logger = logging.getLogger("diffattn.progress")

EVERY = 30.0
"""Seconds before the first line, and at least between two."""
SHARE = 0.1
"""Of the time that has passed: that long at least between two lines."""
FORMAT = "{desc}: {n_fmt} of {total_fmt} after {elapsed}{postfix}"


def bar_options(wanted: bool = True, *, leave: bool = False) -> dict[str, Any]:
    """Arguments of `tqdm`, and of `set_progress_bar_config` of diffusers' pipelines.

    Args:
        wanted: without it there is neither bar nor line.
        leave: on a terminal the bar stays when the work is done.
    """
    if wanted and sys.stderr is not None and sys.stderr.isatty():
        return {"disable": False, "leave": leave}
    if not wanted or not logger.isEnabledFor(logging.INFO):
        return {"disable": True}
    seldom = {"mininterval": EVERY, "maxinterval": EVERY, "miniters": 1, "delay": EVERY}
    return {"disable": False, "leave": False, "file": Lines(), "bar_format": FORMAT, **seldom}


class Lines:
    """In a terminal's place: what tqdm draws over and over becomes lines."""

    def __init__(self) -> None:
        self._begun = self._last = time.monotonic()

    def write(self, text: str) -> None:
        """A bar as tqdm draws it, or what clears one."""
        now = time.monotonic()
        if text.strip() and now - self._last >= SHARE * (now - self._begun):
            self._last = now
            logger.info("%s", text.strip())

    def flush(self) -> None:
        """Each line is whole."""
