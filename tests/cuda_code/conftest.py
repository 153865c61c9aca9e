"""The checks of CUDA code need Triton, to be interpreted: `make cuda-code` installs it apart and runs them."""

import importlib.util
import os
from pathlib import Path

import pytest

READY = importlib.util.find_spec("triton") is not None and os.environ.get("TRITON_INTERPRET") == "1"
collect_ignore_glob = [] if READY else ["test_*.py"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where modules and kernels are written."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    return tmp_path
