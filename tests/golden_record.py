"""What a recorded case says, read by a consumer that may leave nothing out.

record = Record({"heads": 2, "extra": 1})
record["heads"]
record.left()       # ["extra"]: nobody asked for it
"""

from collections.abc import Iterator, Mapping
from typing import Any

Path = tuple[Any, ...]

WORDS = ("note", "notes")
"""Keys that hold words for readers, wherever they are."""


class Record(Mapping[str, Any]):
    """A JSON object, or tensors by name, that notes which of its keys were asked for; so do the objects inside it."""

    def __init__(self, values: Mapping[str, Any], asked: set[Path] | None = None, path: Path = ()) -> None:
        self._values, self._path = values, path
        self.asked: set[Path] = set() if asked is None else asked
        """Paths of the keys that were asked for, shared by all objects of a case."""

    def __getitem__(self, key: str) -> Any:
        value = self._values[key]
        self.asked.add((*self._path, key))
        return _inside(value, self.asked, (*self._path, key))

    def __contains__(self, key: object) -> bool:
        return key in self._values

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def is_text(self, key: str) -> bool:
        return isinstance(self._values[key], str | None)

    def told(self, *keys: str) -> None:
        """Keys that a test needs not compute with, if they are there: seeds, sums and words of the recording."""
        for key in set(keys) & self.keys():
            self.asked.update(_paths_in(self._values[key], (*self._path, key)))

    def plain(self) -> dict[str, Any]:
        """All of it as a dict, for a consumer that refuses what it doesn't know."""
        self.told(*self)
        return dict(self._values)

    def under(self, prefix: str) -> dict[str, Any]:
        """The keys that begin with `prefix`, without it."""
        return {key.removeprefix(prefix): self[key] for key in self if key.startswith(prefix)}

    def left(self) -> list[str]:
        """Names like `config.patch_args.ratio` of what nobody asked for."""
        return [".".join(map(str, path)) for path in _unasked(self._values, self.asked, self._path)]


def _inside(value: Any, asked: set[Path], path: Path) -> Any:
    if isinstance(value, dict):
        return Record(value, asked, path)
    if isinstance(value, list):
        return [_inside(part, asked, (*path, i)) for i, part in enumerate(value)]
    return value


def _children(value: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(value, Mapping):
        yield from value.items()
    elif isinstance(value, list):
        yield from ((i, part) for i, part in enumerate(value) if isinstance(part, dict | list))


def _paths_in(value: Any, path: Path) -> Iterator[Path]:
    yield path
    for key, part in _children(value):
        yield from _paths_in(part, (*path, key))


def _unasked(value: Any, asked: set[Path], path: Path) -> Iterator[Path]:
    for key, part in _children(value):
        here = (*path, key)
        if key in WORDS:
            continue
        if isinstance(value, Mapping) and here not in asked:
            yield here
        else:
            yield from _unasked(part, asked, here)
