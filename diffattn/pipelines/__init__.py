"""Ready-made pipelines; in a checkout their folders lie in the repository's `pipelines/`."""

from pathlib import Path

_root = Path(__file__).resolve().parents[2]
if (_root / "pyproject.toml").is_file() and (_root / "pipelines").is_dir():
    __path__.append(str(_root / "pipelines"))
