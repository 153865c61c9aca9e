"""What the API reference is read from: a hook of mkdocs, and an extension of griffe, which reads the source.

`pipelines/` and `distill/` lie at the root of a checkout, and a reader of source text finds them inside the package
only where they are installed (CONTRIBUTING.md, "Packaging"). So the package is copied as it is installed, below
build/reference.
"""

import re
import shutil
from pathlib import Path
from typing import Any

from griffe import Alias, Extension, Module, Object

ROOT = Path(__file__).resolve().parents[2]
TREE = ROOT / "build" / "reference"
FOLDERS = {"diffattn": "diffattn", "pipelines": "diffattn/pipelines", "distill": "diffattn/distill"}


def on_startup(**_: Any) -> None:
    """mkdocs calls this before it looks for anything."""
    copy_tree(TREE)


def copy_tree(target: Path) -> None:
    """Write the package's Python files anew."""
    shutil.rmtree(target, ignore_errors=True)
    for source, place in FOLDERS.items():
        for file in sorted((ROOT / source).rglob("*.py")):
            copied = target / place / file.relative_to(ROOT / source)
            copied.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, copied)


class Source(Extension):
    """Two things that griffe does not know of the source."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        """griffe calls this for each object: an example in a docstring is a block of code."""
        if obj.docstring is not None:
            obj.docstring.value = fenced(obj.docstring.value)

    def on_package(self, *, pkg: Module, **_: Any) -> None:
        """griffe calls this when a package is read: the name of a function that lies in a module of the same name is
        the function, and not the module.
        """
        modules = [pkg]
        while modules:
            module = modules.pop()
            modules += [member for member in module.members.values() if isinstance(member, Module)]
            for name, member in list(module.members.items()):
                if isinstance(member, Alias) and _is_namesake(pkg, member.target_path):
                    module.set_member(name, Alias(name, f"{member.target_path}.{name}"))


def _is_namesake(pkg: Module, path: str) -> bool:
    """Is the path a module that has a member of the module's own name?"""
    package, _, inside = path.partition(".")
    if package != pkg.name or not inside:
        return False
    try:
        found = pkg.get_member(inside)
    except KeyError:
        return False
    return isinstance(found, Module) and found.name in found.members


def fenced(text: str) -> str:
    """A docstring with its examples, from `>>>` to the next empty line, as blocks of code."""
    return re.sub(r"^>>> .*(?:\n.+)*", lambda match: f"```pycon\n{match[0]}\n```", text, flags=re.MULTILINE)
