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


def needs_class(name: str) -> pytest.MarkDecorator:
    """Skip a test where the class of the tiny model `name` is newer than the installed diffusers."""
    return needs("diffusers", NEWER.get(name, "0"), f"the model class of {name}")


def built(names: Iterable[str]) -> list[Any]:
    """Names of tiny models as parameters, without those that are too new."""
    return [pytest.param(name, marks=needs_class(name)) if name in NEWER else name for name in names]
