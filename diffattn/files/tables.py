"""Tables of options in files: JSON, or TOML by the ending `.toml`."""

import json
import tomllib
from pathlib import Path
from typing import Any


def read_table(path: str | Path, what: str = "config file") -> dict[str, Any]:
    """The one table that a file holds; `ValueError` names the file that is none, and `what` it is to be."""
    path = Path(path)
    if not path.name:
        raise ValueError(f"expected a {what}; got {str(path)!r}, no name of a file")
    kind = "TOML" if path.suffix.lower() == ".toml" else "JSON"
    try:
        text = path.read_text(encoding="utf-8-sig")
        values = tomllib.loads(text) if kind == "TOML" else json.loads(text, object_pairs_hook=_once)
    except FileNotFoundError as error:
        raise ValueError(f"there is no {what} {path}") from error
    except OSError as error:
        raise ValueError(f"expected a {what}; {path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:  # of TOML, JSON and UTF-8 as well
        hint = "" if kind == "TOML" or path.suffix.lower() == ".json" else "; a TOML file must end in .toml"
        raise ValueError(f"{path} is not valid {kind}: {error}{hint}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold one table of fields, got {type(values).__name__}")
    return values


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A table whose names are there once, as TOML asks for."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} is there twice")
    return found
