"""The API reference: every public name, each with types, shapes and errors."""

import ast
import importlib
import inspect
import re
import textwrap
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
PUBLIC = (
    "diffattn", "diffattn.adapters", "diffattn.adapters.published", "diffattn.calibration", "diffattn.comparison",
    "diffattn.description", "diffattn.families", "diffattn.kernels", "diffattn.kernels.grouped",
    "diffattn.kernels.routed", "diffattn.measure", "diffattn.measure.bench", "diffattn.measure.estimate",
    "diffattn.mechanisms", "diffattn.parallel", "diffattn.pipelines.long_video", "diffattn.pipelines.pixel_aware_sr",
    "diffattn.pipelines.portrait_animation", "diffattn.pipelines.video_sr", "diffattn.swap", "diffattn.video",
)  # fmt: skip
"""Modules whose `__all__` is public."""


class Entry(NamedTuple):
    """A directive of a page: the object's name, and the names of the members that are shown; None: all."""

    name: str
    members: list[str] | None


@cache
def entries() -> tuple[Entry, ...]:
    found = []
    for page in sorted((ROOT / "docs" / "reference").glob("*.md")):
        for name, text in re.findall(r"^::: (\S+)\n((?:    .*\n)*)", page.read_text(), flags=re.MULTILINE):
            members = yaml.safe_load(text)["options"].get("members") if text else None
            found.append(Entry(name, members or [] if members is not None else None))
    return tuple(found)


@cache
def find(name: str) -> Any:
    """The object of a dotted name."""
    module, _, attribute = name.rpartition(".")
    try:
        return getattr(importlib.import_module(module), attribute)
    except ImportError:
        return getattr(find(module), attribute)


def shown() -> Iterator[tuple[str, Callable[..., Any]]]:
    """The functions and methods that the pages show, properties included."""
    for entry in entries():
        found = find(entry.name)
        if inspect.isfunction(found) and "<locals>" not in found.__qualname__:  # those are values, made by a function
            yield entry.name, found
        for name, member in vars(found).items() if inspect.isclass(found) else ():
            if name in entry.members if entry.members is not None else not name.startswith("_") or name == "__call__":
                inner = member.fget if isinstance(member, property) else getattr(member, "__func__", member)
                if inspect.isfunction(inner):
                    yield f"{entry.name}.{name}", inner


@pytest.mark.parametrize("module", PUBLIC)
def test_every_public_name_has_its_entry(module: str) -> None:
    objects = [find(entry.name) for entry in entries()]
    home = importlib.import_module(module)
    missing = [name for name in home.__all__ if not any(one is getattr(home, name) for one in objects)]
    assert missing == [], f"no page below docs/reference has these of {module}"


def test_no_name_has_two_entries() -> None:
    names = [entry.name for entry in entries()]
    assert sorted(set(names)) == sorted(names)


def test_classes_and_functions_say_what_they_are() -> None:
    classes = [entry.name for entry in entries() if inspect.isclass(find(entry.name))]
    assert [name for name in classes if not vars(find(name)).get("__doc__")] == []
    assert [name for name, function in shown() if not inspect.getdoc(function)] == []


def test_functions_have_types() -> None:
    for name, function in shown():
        signature = inspect.signature(function)
        given = [each for each in signature.parameters.values() if each.name not in ("self", "cls")]
        assert [each.name for each in given if each.annotation is inspect.Parameter.empty] == [], name
        assert signature.return_annotation is not inspect.Signature.empty, name


def test_functions_say_what_they_raise() -> None:
    for name, function in shown():
        text = inspect.getdoc(function) or ""
        for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(function)))):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
                error = ast.unparse(node.exc.func)
                said = error in text or (error == "ImportError" and "extra" in text) or error == "NotImplementedError"
                assert said, f"{name} raises {error}, and its docstring does not say when"


def test_functions_of_tensors_say_their_shapes() -> None:
    for name, function in shown():
        signature = inspect.signature(function)
        types = [str(each.annotation) for each in signature.parameters.values()] + [str(signature.return_annotation)]
        if any(re.search(r"\b(Tensor|ndarray|NDArray)\b", one) for one in types):
            text = inspect.getdoc(function) or ""
            assert re.search(r"\([^()]*,[^()]*\)|shape", text), f"{name} has tensors, and its docstring gives no shape"


def test_mechanisms_name_their_source() -> None:
    names = [entry.name for entry in entries() if re.fullmatch(r"diffattn\.\w+Attention", entry.name)]
    assert len(names) >= 19
    for name in names:
        text = importlib.import_module(find(name).__module__).__doc__ or ""
        assert re.search(r"arxiv\.org/abs/\d{4}\.\d{5}", text), f"the module of {name} names no paper"
