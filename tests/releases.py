"""What a test needs of a release: the lowest versions that pyproject.toml admits lack a thing here and there."""

import importlib.metadata

import pytest
from packaging.version import Version


def needs(package: str, lowest: str, thing: str) -> pytest.MarkDecorator:
    """Skip a test where an older release of `package` is installed, naming the `thing` that it lacks."""
    installed = importlib.metadata.version(package)
    return pytest.mark.skipif(
        Version(installed) < Version(lowest), reason=f"needs {package} {lowest}: {thing} (installed: {installed})"
    )
