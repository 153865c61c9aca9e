"""The tiny random pipeline that the tests of long videos run on."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import tiny_video


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its folder."""
    return tiny_video.write_pipeline(tmp_path_factory.mktemp("model"))
