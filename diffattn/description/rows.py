"""A row to try: the readers that tell what was measured, and the text of the row."""

import dataclasses
import itertools
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..families import Arguments, Family, Layers, Read, readers, video_readers
from ..families.layout import MaskKind, transformer
from .grids import Source, View, config_of, frames_key, patches, short_name, snake_name
from .probing import Place

_SIDES: tuple[dict[str, Any], ...] = ({"before": 0}, {}, {"before": 0, "after": None})
"""The cells alone; text before them, as readers have it unless told otherwise; text behind them."""
_WIDTH = 116
"""Columns that a row has inside of `ROWS`."""


@dataclass(frozen=True)
class Reader:
    """A reader, as it is written in a row."""

    text: str
    code: str = ""
    """Source of a function that has to be written beside the row; empty for readers of the library."""
    kind: str = "spatial"
    owner: str = ""
    """Rest of a layer's name, as a regular expression, behind the module that tells the grid."""
    owned: bool = False
    """Is it another module than the model?"""
    features: bool = True
    """Is the block around the layer called with its input?"""
    mask: MaskKind = "keys"
    """What the layer's own masks are."""
    doubt: str = ""
    """What these inputs cannot tell of it."""

    def read(self) -> Read:
        """The function itself."""
        names = namespace()
        exec(self.code, names)
        found: Read = eval(self.text, names)
        return found


def namespace() -> dict[str, Any]:
    """The names that a row may use in the modules of `diffattn.families`."""
    own = {"Family": Family, "Layers": Layers, "transformer": transformer}
    return {**vars(video_readers), **vars(readers), **own}


def reader_for(
    model: nn.Module, given: Arguments, source: Source, view: View, calls: list[tuple[Place, int]]
) -> Reader | None:
    """The first reader that tells the measured places in calls of so many tokens; None where none does."""
    sides, doubt = _sides(calls[0][0], source, given)
    for reader in _candidates(model, source, view, sides):
        try:
            layouts = reader.read()(model, given)
            grids = [layout.grid(tokens) for layout, (_, tokens) in zip(itertools.cycle(layouts), calls, strict=False)]
        except (AttributeError, IndexError, KeyError, NotImplementedError, TypeError, ValueError):
            continue
        told = [((grid.frames, grid.height, grid.width), grid.before, grid.after) for grid in grids]
        if told == [(own.size, own.before, own.after) for own, _ in calls]:
            named = bool(source.code) or not source.reader  # the library's readers of tokens know their sides
            return dataclasses.replace(reader, doubt="; ".join(filter(None, (source.doubt, doubt if named else ""))))
    return None


def _sides(place: Place, source: Source, given: Arguments) -> tuple[tuple[dict[str, Any], ...], str]:
    """How a reader may tell what lies beside the cells, and what is not known of it."""
    if not (place.before and place.after):
        return _SIDES, ""
    lengths = [(name, value.shape[1]) for name, value in given.items() if isinstance(value, Tensor) and value.ndim > 1]
    texts = {length for name, length in lengths if name != source.argument}
    behind = place.after in texts and place.before not in texts
    count, side, other = (place.before, "before", "behind") if behind else (place.after, "behind", "before")
    doubt = (
        f"{place.before} tokens lie before the cells and {place.after} behind: the row has {count} {side} them in "
        f"every call, and any number {other}; describe it again with another length of text"
    )
    return ({"before": count, "after": None} if behind else {"after": count},), doubt


def _candidates(model: nn.Module, source: Source, view: View, sides: tuple[dict[str, Any], ...]) -> Iterator[Reader]:
    """The library's readers first, then one that has to be written."""
    kind = "temporal" if view.name == "along frames" else "spatial"
    if source.reader:
        for side in sides if source.code else sides[:1]:
            yield Reader(source.reader, source.code.replace("{sides}", _named(side)))
        return
    assert source.axes is not None
    patched = "patch_size" in config_of(model)
    for side in sides:
        flat = source.axes[0] is None or view.name == "frame"
        if patched and source.axes[1:] in ((2, 3), (3, 4)) and flat:
            yield Reader(_call("picture", [] if source.argument == "hidden_states" else [source.argument], side))
        if patched and source.axes[1:] == (3, 4) and view.name == "whole" and source.argument == "hidden_states":
            key = frames_key(model)
            yield Reader(_call("video", [source.axes[0]], {**side, **({"patch_t": key} if key else {})}))
    for side in sides:
        yield _own(model, source, view, side, kind)


def _call(name: str, positional: list[Any], named: dict[str, Any]) -> str:
    arguments = [_literal(value) for value in positional]
    return f"{name}({(', '.join(arguments) + _named(named)).removeprefix(', ')})"


def _named(options: dict[str, Any]) -> str:
    """`, before=0, after=None`"""
    return "".join(f", {name}={_literal(value)}" for name, value in options.items())


def _literal(value: Any) -> str:
    return f'"{value}"' if isinstance(value, str) else repr(value)


def _own(model: nn.Module, source: Source, view: View, side: dict[str, Any], kind: str) -> Reader:
    """A reader of its own, for latents that no reader of the library reads."""
    name = snake_name(model) + {"whole": "", "frame": "_frame", "along frames": "_along_frames"}[view.name]
    assert source.axes is not None
    words = {0: "b", **dict(zip(source.axes, ("frames", "height", "width"), strict=True))}
    shape = ", ".join(words.get(axis, "c") for axis in range(4 if source.axes[0] is None else 5))
    named = ["frames", "height", "width"]
    sizes: dict[str, list[int | None]] = {"whole": [1, 2, 0], "frame": [1, 2], "along frames": [None, None, 0]}
    size = sizes[view.name]
    if source.axes[0] is None:
        size.remove(0)
    needed = [axis for axis in range(3) if axis in size]
    cells = ["1" if axis is None else _length(model, source, axis, named[axis]) for axis in size]
    patch = '    patch = _patch(module, "patch_size")\n' if any("// patch" in cell for cell in cells) else ""
    code = (
        f"def {name}(module: nn.Module, call: Arguments) -> tuple[Layout, ...]:\n"
        f'    """{source.argument} ({shape})."""\n'
        f"    {', '.join(named[axis] for axis in needed)} = "
        f"{_taken(source.argument, [source.axes[axis] for axis in needed])}\n"
        f"{patch}"
        f"    return (Layout({', '.join(cells)}{_named(side)}),)\n"
    )
    return Reader(name, code, kind)


def _taken(argument: str, axes: list[int | None]) -> str:
    """These lengths of an argument's shape, as code."""
    if len(axes) == 1:
        return f'call["{argument}"].shape[{axes[0]}]'
    return f'(call["{argument}"].shape[axis] for axis in ({", ".join(map(str, axes))}))'


def _length(model: nn.Module, source: Source, axis: int, name: str) -> str:
    """One side of the grid, as code."""
    patch = source.patch[axis]
    if patch == 1:
        return name
    if "patch_size" not in config_of(model) or patch != patches(model)[0][axis]:
        return f"{name} // {patch}"
    if axis:
        return f"{name} // patch"
    return f'{name} // _patch(module, "{frames_key(model)}", axis=0)'


def level_reader(layer: str, owner: str, temporal: bool) -> Reader:
    """The reader of a level of a UNet, by a module around the layer or by itself."""
    rest = pattern_of(layer[len(owner) :])
    if temporal:
        return Reader('frames_of("num_frames")', kind="temporal", owner=rest, owned=True)
    return Reader("feature_map", owner=rest, owned=True)


def pattern_of(name: str) -> str:
    """A layer's name as a regular expression for all its numbers of blocks."""
    return re.sub(r"(?<=\\\.)\d+(?=\\\.|$)", r"\\d+", re.escape(name))


def join_patterns(names: Iterable[str], others: Iterable[str]) -> str:
    """A regular expression for these layers and for none of the others."""
    names, others = list(names), list(others)
    for numbered in (pattern_of, re.escape):
        patterns = list(dict.fromkeys(numbered(name) for name in names))
        joined = _alternatives(patterns)
        if not any(re.fullmatch(joined, other) for other in others):
            return joined
    return joined


def _alternatives(patterns: list[str]) -> str:
    """`(single_)?blocks`, `(a|b)\\.attn`: what they have in common outside, the rest inside a group."""
    if len(patterns) == 1:
        return patterns[0]
    parts = [re.findall(r"\\d\+|\w+?_|\w+|\\?.", pattern) for pattern in patterns]
    start = _common(parts)
    end = _common([list(reversed(part[start:])) for part in parts])
    middles = ["".join(part[start : len(part) - end]) for part in parts]
    head, tail = "".join(parts[0][:start]), "".join(parts[0][len(parts[0]) - end :])
    inside = "|".join(middle for middle in middles if middle)
    return f"{head}({inside}){'' if all(middles) else '?'}{tail}"


def _common(parts: list[list[str]]) -> int:
    """How many first elements all lists share."""
    return sum(1 for _ in itertools.takewhile(lambda column: len(set(column)) == 1, zip(*parts, strict=False)))


def row_text(model: nn.Module, entries: list[tuple[str, Reader]], options: dict[str, str]) -> str:
    """The row, as it stands inside of `ROWS`."""
    pattern, first = entries[0]
    if len(entries) == 1 and not first.owned and first.features and first.kind == "spatial":
        whole = [f'transformer(r"{pattern}", {first.text}{_masked(first)})']
    else:
        whole = ["(", *(line for entry in entries for line in _layers(*entry, room=_WIDTH - 4)), ")"]
    parts = [f'"{short_name(model)}"', f'("{type(model).__name__}",)']
    named = [f'{name}="{value}"' for name, value in options.items()]
    line = f"Family({', '.join([*parts, *whole, *named])}),"
    if len(whole) == 1 and len(line) <= _WIDTH:
        return line
    lines = [*(f"{part}," for part in parts), *whole[:-1], f"{whole[-1]},", *(f"{option}," for option in named)]
    return "\n".join(["Family(", *(f"    {line}" for line in lines), "),"])


def _masked(reader: Reader) -> str:
    return "" if reader.mask == "keys" else f', mask="{reader.mask}"'


def _layers(pattern: str, reader: Reader, room: int) -> list[str]:
    parts = [f'r"{pattern}"', f'"{reader.kind}"', reader.text]
    parts += [f'r"(.*){reader.owner}"'] if reader.owned else []
    parts += [] if reader.features else ["has_features=False"]
    line = f"    Layers({', '.join(parts)}{_masked(reader)}),"
    if len(line) <= room:
        return [line]
    parts += [_masked(reader).removeprefix(", ")] if _masked(reader) else []
    return ["    Layers(", *(f"        {part}," for part in parts), "    ),"]


def distinct(found: list[Reader]) -> list[Reader]:
    """The same readers, those that have to be written under names of their own."""
    codes: dict[str, str] = {}
    named = []
    for reader in found:
        name = next(name for name in _numbered(reader.text) if codes.get(name, reader.code) == reader.code)
        if reader.code:
            codes[name] = reader.code
            code = reader.code.replace(f"def {reader.text}(", f"def {name}(")
            reader = dataclasses.replace(reader, text=name, code=code)
        named.append(reader)
    return named


def _numbered(name: str) -> Iterator[str]:
    yield name
    yield from (f"{name}_{number}" for number in itertools.count(2))


def evaluated(row: str, code: str) -> Family:
    """The row itself; `code` holds the readers that were written for it."""
    names = namespace()
    exec(code, names)
    [family] = eval(f"({row})", names)
    assert isinstance(family, Family)
    return family
