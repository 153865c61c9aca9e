"""What every pipeline of diffusers passes to its models, read from the source without importing it."""

import ast
import importlib.util
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

MODEL_BASES = ("ModelMixin", "LegacyModelMixin")
MODEL_FOLDERS = ("models/transformers", "models/unets", "models/controlnets")


@dataclass(frozen=True)
class Call:
    """One call of a model in the source of a pipeline."""

    part: str
    """Name of the component that is called."""
    positional: int
    """Arguments without a name."""
    named: frozenset[str]
    where: str
    """File and line."""


@dataclass(frozen=True)
class Pipeline:
    """One pipeline class."""

    name: str
    parts: dict[str, tuple[str, ...]]
    """Component -> names of the classes that its annotation admits."""
    calls: tuple[Call, ...] = ()
    inner: tuple[str, ...] = ()
    """Pipelines that it makes and hands its components to."""

    def models_of(self, call: Call) -> tuple[str, ...]:
        """Class names of what a call may go to."""
        return self.parts[call.part]


@dataclass(frozen=True)
class _Class:
    """A class of the source, with the file that it is in."""

    name: str
    bases: tuple[str, ...]
    file: Path

    @property
    def methods(self) -> dict[str, ast.FunctionDef]:
        [node] = [node for node in _nodes(self.file) if node.name == self.name]
        return {method.name: method for method in node.body if isinstance(method, ast.FunctionDef)}


def root() -> Path:
    """The folder of diffusers."""
    spec = importlib.util.find_spec("diffusers")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent


@cache
def _text(file: Path) -> str:
    return file.read_text()


@cache
def _nodes(file: Path) -> list[ast.ClassDef]:
    return [node for node in ast.parse(_text(file)).body if isinstance(node, ast.ClassDef)]


@cache
def _classes(folder: str) -> dict[str, _Class]:
    """Every class that the files below a folder of diffusers define."""
    found = {}
    for file in sorted((root() / folder).rglob("*.py")):
        for match in re.finditer(r"^class (\w+)(?:\(([^)]*)\))?:", _text(file), re.MULTILINE):
            bases = re.findall(r"(\w+)\s*(?:,|$)", re.sub(r"#.*", "", match[2] or "").strip())
            found[match[1]] = _Class(match[1], tuple(bases), file)
    return found


def classes_of(folder: str) -> frozenset[str]:
    """Names of the classes that the files below a folder of diffusers define."""
    return frozenset(_classes(folder))


def _lineage(name: str, classes: dict[str, _Class]) -> list[_Class]:
    """A class and those it inherits from, the nearest first."""
    found: dict[str, _Class] = {}
    waiting = [name]
    while waiting:
        own = waiting.pop(0)
        if own in classes and own not in found:
            found[own] = classes[own]
            waiting += classes[own].bases
    return [*found.values()]


def _is_a(name: str, base: str, classes: dict[str, _Class]) -> bool:
    return any(base in own.bases for own in _lineage(name, classes))


@cache
def model_classes() -> frozenset[str]:
    """Names of the models that the folders of diffusers define, and of those that pipelines define for themselves."""
    known = {**_classes("pipelines")}
    for folder in MODEL_FOLDERS:
        known |= _classes(folder)
    return frozenset(name for name in known if any(_is_a(name, base, known) for base in MODEL_BASES))


@cache
def pipelines() -> dict[str, Pipeline]:
    """Every pipeline class below `diffusers.pipelines`, in the order of their names."""
    classes = _classes("pipelines")
    names = sorted(name for name in classes if _is_a(name, "DiffusionPipeline", classes))
    return {name: _pipeline(name, classes) for name in names}


def _pipeline(name: str, classes: dict[str, _Class]) -> Pipeline:
    methods: dict[str, tuple[ast.FunctionDef, Path]] = {}
    for own in reversed(_lineage(name, classes)):
        if own.name != "DiffusionPipeline":  # which calls no model
            methods |= {key: (method, own.file) for key, method in own.methods.items()}
    parts = _parts(methods["__init__"][0]) if "__init__" in methods else {}
    models = frozenset(part for part, names in parts.items() if not model_classes().isdisjoint(names))
    calls = [call for method, file in methods.values() for call in _calls(method, file, models)]
    made = {found for key in methods for found in re.findall(r"\b(\w+Pipeline)\(", _lines(*methods[key]))}
    inner = {found for found in made - {name} if found in classes}
    return Pipeline(name, parts, tuple(calls), tuple(sorted(inner)))


@cache
def _text_lines(file: Path) -> list[str]:
    return _text(file).split("\n")


def _lines(method: ast.FunctionDef, file: Path) -> str:
    return "\n".join(_text_lines(file)[method.lineno : method.end_lineno])


def _parts(start: ast.FunctionDef) -> dict[str, tuple[str, ...]]:
    """The components of a pipeline by the annotations of its `__init__`."""
    every = [*start.args.posonlyargs, *start.args.args, *start.args.kwonlyargs]
    return {own.arg: tuple(_names(own.annotation)) for own in every if own.annotation is not None}


def _names(annotation: ast.expr) -> Iterator[str]:
    for node in ast.walk(annotation):
        if isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield from _names(ast.parse(node.value, mode="eval").body)


def _calls(method: ast.FunctionDef, file: Path, models: frozenset[str]) -> Iterator[Call]:
    """The calls of models in one method, by their own names and by those they are given there."""
    text = _lines(method, file)
    if not any(f"self.{part}" in text for part in models):
        return
    nodes = [*ast.walk(method)]
    others: dict[str, set[str]] = {}
    for node in nodes:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            values = [node.value.body, node.value.orelse] if isinstance(node.value, ast.IfExp) else [node.value]
            own = {part for value in values if (part := _own_part(value)) in models}
            others.setdefault(node.targets[0].id, set()).update(own)
    for node in nodes:
        if isinstance(node, ast.Call):
            part = _own_part(node.func)
            called = {part} & models if part else others.get(getattr(node.func, "id", ""), set())
            for own_part in sorted(called):
                positional = sum(not isinstance(argument, ast.Starred) for argument in node.args)
                where = f"{file.relative_to(root())}:{node.lineno}"
                yield Call(own_part, positional, frozenset(_passed(node, nodes)), where)


def _own_part(node: ast.expr) -> str:
    """`x` where the expression is `self.x`."""
    is_own = isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self"
    return node.attr if is_own and isinstance(node, ast.Attribute) else ""


def _passed(call: ast.Call, nodes: list[ast.AST]) -> Iterator[str]:
    """Names of a call's arguments; those of `**values` by what the method puts into the dict, else `**values`."""
    for keyword in call.keywords:
        if keyword.arg is not None:
            yield keyword.arg
        elif isinstance(keyword.value, ast.Name):
            yield from set(_keys(keyword.value.id, nodes)) or {f"**{keyword.value.id}"}
        else:
            yield f"**{ast.unparse(keyword.value)}"


def _keys(name: str, nodes: list[ast.AST]) -> Iterator[str]:
    """What a method puts into the dict of that name."""
    for node in nodes:
        if isinstance(node, ast.Assign):
            for target in node.targets:
                if isinstance(target, ast.Name) and target.id == name:
                    yield from _dict_keys(node.value, nodes)
                if isinstance(target, ast.Subscript) and getattr(target.value, "id", "") == name:
                    yield from _constant(target.slice)
        is_update = isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "update"
        if isinstance(node, ast.Call) and is_update and getattr(getattr(node.func, "value", None), "id", "") == name:
            for value in node.args:
                yield from _dict_keys(value, nodes)


def _dict_keys(value: ast.expr, nodes: list[ast.AST]) -> Iterator[str]:
    """Of a dict that is written down, or made from the keys of another."""
    for node in ast.walk(value):
        if isinstance(node, ast.Dict):
            for key in node.keys:
                yield from _constant(key)
        elif isinstance(node, ast.DictComp):
            source = node.generators[0].iter
            if isinstance(source, ast.Call) and isinstance(source.func, ast.Attribute):
                yield from _keys(getattr(source.func.value, "id", ""), nodes)


def _constant(node: ast.expr | None) -> Iterator[str]:
    if isinstance(node, ast.Constant):
        yield str(node.value)


@cache
def modular_pipelines() -> dict[str, Pipeline]:
    """Every modular pipeline class, with the models that the files of its folder name."""
    classes = _classes("modular_pipelines")
    found = {}
    for name in sorted(name for name in classes if _is_a(name, "ModularPipeline", classes)):
        text = "".join(_text(file) for file in sorted(classes[name].file.parent.glob("*.py")))
        words = set(re.findall(r"\b\w+\b", text))
        found[name] = Pipeline(name, {"models": tuple(sorted(words & model_classes()))})
    return found
