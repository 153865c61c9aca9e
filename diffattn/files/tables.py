"""Tables of options in files: JSON, or TOML by the ending `.toml`."""

import json
import tomllib
from pathlib import Path
from typing import Any


def read_table(path: str | Path) -> dict[str, Any]:
    """The one table that a file holds; `ValueError` names the file that is none."""
    path = Path(path)
    kind = "TOML" if path.suffix.lower() == ".toml" else "JSON"
    try:
        text = path.read_text(encoding="utf-8")
        values = tomllib.loads(text) if kind == "TOML" else json.loads(text)
    except FileNotFoundError as error:
        raise ValueError(f"there is no config file {path}") from error
    except OSError as error:
        raise ValueError(f"expected a config file; {path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:  # of TOML, JSON and UTF-8 as well
        raise ValueError(f"{path} is not valid {kind}: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold one table of fields, got {type(values).__name__}")
    return values
