"""The processes of these tests end with them."""

from collections.abc import Iterator

import pytest
from parallel_ranks import close_pools


@pytest.fixture(scope="session", autouse=True)
def pools() -> Iterator[None]:
    yield
    close_pools()
