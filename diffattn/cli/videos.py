"""What commands that read and write videos share."""

import contextlib
import logging
from collections.abc import Iterable, Iterator
from typing import Any


def bar(frames: Iterable[Any], label: str, total: int | None) -> Iterable[Any]:
    """A progress bar where there is a terminal, else lines."""
    from tqdm import tqdm

    from ..measure.progress import bar_options

    return tqdm(frames, desc=label, total=total, unit="frame", **bar_options())


@contextlib.contextmanager
def once() -> Iterator[None]:
    """Log nothing twice: what is odd about a driving video would be told whenever it is read."""
    logger, told = logging.getLogger("diffattn"), set[str]()

    def is_new(record: logging.LogRecord) -> bool:
        before = len(told)
        told.add(record.getMessage())
        return len(told) > before

    logger.addFilter(is_new)
    try:
        yield
    finally:
        logger.removeFilter(is_new)
