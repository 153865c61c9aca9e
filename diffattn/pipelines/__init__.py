"""Ready-made pipelines; in a checkout their folders lie in the repository's `pipelines/`."""

import sys
from importlib import import_module
from pathlib import Path

_root = Path(__file__).resolve().parents[2]
if (_root / "pyproject.toml").is_file() and (_root / "pipelines").is_dir():
    __path__.append(str(_root / "pipelines"))


def keep_paths(package: str, places: dict[str, str]) -> None:
    """Let modules of `package` be found under the names that `model_index.json` files of saved pipelines hold."""
    for name, place in places.items():
        sys.modules[f"{package}.{name}"] = import_module(f"{package}.{place}")
