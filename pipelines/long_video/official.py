"""The configuration files of the released Video-Infinity code, read as settings of this pipeline.

    {"devices": [0, 1], "seed": 123, "pipe_configs": {"prompts": [...], "num_frames": 24, ...},
     "plugin_configs": {"attn": {"padding": 8, "top_k": 16, ..., "local_phase": {"t", "local_biase", "global_biase"}}}}

`num_frames` counts one device's frames; the prompts are dealt out to the devices, with a hard cut between. Names that
the project's README writes otherwise (`topk`, `local_bias`) are understood, and what has no effect is named in a log
line. Unknown names are refused.
"""

import logging
from pathlib import Path
from typing import Any

from diffattn.files.records import Record, is_record
from diffattn.files.tables import read_table

from .config import check_names
from .prompts import even_ranges

logger = logging.getLogger("diffattn.long_video")

TOP = ["dtype", "devices", "seed", "master_port", "base_path", "pipe_configs", "plugin_configs"]
PIPE = ["prompts", "steps", "guidance_scale", "fps", "num_frames", "height", "width", "export_fps", "file_name"]
PLUGINS = ["attn", "conv_3d", "conv_layer"]
ATTENTION = [
    *("padding", "top_k", "top_k_chunk_size", "attn_scale", "token_num_scale", "dynamic_scale"),
    *("local_phase", "global_phase"),
]
PHASE = ["t", "local_biase", "global_biase"]
SLIPS = {"topk": "top_k", "local_bias": "local_biase", "global_bias": "global_biase"}
WITHOUT_EFFECT = {
    "dtype": "use --dtype",
    "master_port": "torchrun has --master-port",
    "base_path": "use --output",
    "pipe_configs.file_name": "use --output",
    "plugin_configs.attn.top_k_chunk_size": "the released code does not read it either",
    "plugin_configs.conv_3d": "convolutions are exact",
    "plugin_configs.conv_layer": "convolutions are exact",
}
COMMAND = (
    "prompt",
    "work",
    "save_every",
    "resume",
    "overwrite",
    "keep",
    "timeout",
    "device",
    "dtype",
    "threads",
    "output",
)
"""Options of `diffattn long-video` that are no settings: the command takes them from the same file."""
DEFAULTS: dict[str, Any] = {"scheduler": "sde-dpmsolver++", "blend": 0, "model": "videocrafter2"}


def read_settings(path: Path) -> dict[str, Any]:
    """The fields of `LongVideoConfig` that a JSON or TOML file sets: one of the released code, our own, or a record."""
    values = read_table(path)
    if "pipe_configs" in values:
        return from_official(values)
    values = dict(Record.from_table(values, path).options) if is_record(values) else values
    told = {name.replace("-", "_"): value for name, value in values.items()}
    texts = [name for name in ("prompts",) if isinstance(told.get(name), str)]  # the name of a file
    return {name: value for name, value in told.items() if name not in (*COMMAND, *texts)}


def from_official(values: dict[str, Any]) -> dict[str, Any]:
    """Fields of `LongVideoConfig` from the released code's configuration."""
    check_names(values, TOP, "the config")
    pipe, plugins = values["pipe_configs"], values.get("plugin_configs", {})
    check_names(pipe, PIPE, "pipe_configs")
    check_names(plugins, PLUGINS, "plugin_configs")
    _tell_ignored({"": values, "pipe_configs.": pipe, "plugin_configs.": plugins})
    devices = values.get("devices", [0])
    if not isinstance(devices, list):
        raise ValueError(f"devices must be a list, such as [0, 1], got {devices!r}")
    clips = len(devices) or 1
    prompts, length = pipe.get("prompts"), pipe.get("num_frames", 24)
    if not isinstance(prompts, list) or not prompts:
        raise ValueError(f"pipe_configs.prompts must be a list of texts, got {prompts!r}")
    for number, prompt in enumerate(prompts, 1):
        if not isinstance(prompt, str):
            raise ValueError(f"pipe_configs.prompts, entry {number}: expected a text, got {prompt!r}")
    if type(length) is not int or length < 1:
        raise ValueError(f"pipe_configs.num_frames must be a whole number of at least 1, got {length!r}")
    names = {"steps": "steps", "guidance_scale": "guidance", "fps": "model_fps", "export_fps": "fps"}
    names |= {"height": "height", "width": "width"}
    found = {ours: pipe[theirs] for theirs, ours in names.items() if theirs in pipe}
    found["frames"] = clips * length
    found["prompts"] = even_ranges(prompts, found["frames"], clips)
    if "seed" in values:
        found["seed"] = values["seed"]
    return {**DEFAULTS, **found, **_attention(plugins.get("attn", {}))}


def _attention(given: Any) -> dict[str, Any]:
    attn = _mended(given, "plugin_configs.attn")
    check_names(attn, ATTENTION, "plugin_configs.attn")
    if attn.get("top_k_chunk_size") is not None:
        _tell("plugin_configs.attn.top_k_chunk_size")
    found: dict[str, Any] = {
        name: attn[name] for name in ("padding", "top_k", "attn_scale", "token_num_scale") if name in attn
    }
    if not isinstance(attn.get("dynamic_scale", False), bool):
        raise ValueError(f"plugin_configs.attn.dynamic_scale must be true or false, got {attn['dynamic_scale']!r}")
    for name in ("local_phase", "global_phase"):
        found[name] = _phase(attn.get(name), name) if attn.get("dynamic_scale", False) else None
    if attn.get("dynamic_scale", False) and not (found["local_phase"] and found["global_phase"]):
        raise ValueError("plugin_configs.attn: dynamic_scale needs local_phase and global_phase; add them")
    return found


def _phase(given: Any, name: str) -> tuple[float, float, float] | None:
    if given is None:
        return None
    phase = _mended(given, f"plugin_configs.attn.{name}")
    check_names(phase, PHASE, f"plugin_configs.attn.{name}")
    if "t" not in phase:
        raise ValueError(f"plugin_configs.attn.{name} lacks t, the timestep where it begins or ends")
    return phase["t"], phase.get("local_biase", 0), phase.get("global_biase", 0)


def _mended(given: Any, where: str) -> dict[str, Any]:
    """The entries under the names that the released code reads."""
    check_names(given, list(given) if isinstance(given, dict) else [], where)
    for slip in set(given) & set(SLIPS):
        logger.warning("%s.%s: read as %s", where, slip, SLIPS[slip])
    return {SLIPS.get(name, name): value for name, value in given.items()}


def _tell_ignored(tables: dict[str, dict[str, Any]]) -> None:
    for prefix, table in tables.items():
        for name, value in table.items():
            if prefix + name in WITHOUT_EFFECT and value not in (None, {}):
                _tell(prefix + name)


def _tell(name: str) -> None:
    logger.warning("%s has no effect here: %s", name, WITHOUT_EFFECT[name])
