"""What a test needs of a release: the lowest versions that pyproject.toml admits lack a thing here and there."""

import importlib.metadata
from collections.abc import Iterable
from typing import Any

import pytest
from further import NEWER
from packaging.version import Version


def needs(package: str, lowest: str, thing: str) -> pytest.MarkDecorator:
    """Skip a test where an older release of `package` is installed, naming the `thing` that it lacks."""
    installed = importlib.metadata.version(package)
    return pytest.mark.skipif(
        Version(installed) < Version(lowest), reason=f"needs {package} {lowest}: {thing} (installed: {installed})"
    )


def built(names: Iterable[str]) -> list[Any]:
    """Names of tiny models as parameters: a class that is newer than the installed diffusers is skipped."""
    return [
        pytest.param(name, marks=needs("diffusers", NEWER[name], f"the model class of {name}"))
        if name in NEWER
        else name
        for name in names
    ]
