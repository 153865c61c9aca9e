"""`save`: an adapter's folder, and its way to the hub."""

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn

from ..config import plain
from ..files.writing import write_json, written
from ..swap.apply import swaps_of
from ..swap.model_swap import ModelSwap
from ..swap.plan import COMPONENTS
from . import lora
from .checks import mechanism_weights, stored_name
from .files import CONFIG_NAME, FILE_NAME, LORA_NAME
from .slopes import SUFFIX


def save(
    target: Any,
    folder: str | os.PathLike[str],
    *,
    include: Iterable[str] = (),
    push_to_hub: bool = False,
    repo_id: str | None = None,
) -> Path:
    """Write the adapter of a swapped model or pipeline to `folder`; returns the weights file.

    It holds the mechanism's own weights, the projections that `load` replaced, and the model's parameters named in
    `include` (after training them). A LoRA on the model is written beside them in diffusers' format, at its full
    weight whatever `set_adapters` gave it; where there is nothing else, it is the only weights file.
    `diffattn_config.json` says what it all is.

    `push_to_hub` uploads these files, and a README.md beside them, to `repo_id` (default: the folder's name).
    """
    files = write(target, folder, include=include)
    if push_to_hub:
        push(Path(folder), [path.name for path in files], repo_id)
    return files[0]


def write(
    target: Any,
    folder: str | os.PathLike[str],
    *,
    include: Iterable[str] = (),
    base_model: str | None = None,
    component: str | None = None,
    drawn: Mapping[str, Sequence[Any]] | None = None,
    slopes: Mapping[str, Tensor] | None = None,
) -> list[Path]:
    """`save` without a hub; returns the files, the config last.

    Args:
        base_model: overrides where the model came from.
        component: which model of a pipeline with several it is.
        drawn: options of the mechanism and the values that one training had of them, for `load` to know; None: those
            of the adapter that was loaded.
        slopes: by the names of their weights and of their shapes, what these lean by with the option that was drawn
            (`slopes.py`).
    """
    folder, [swap] = Path(folder), _one(swaps_of(target))
    names, tensors = _tensors(swap, include)
    tensors |= {name + SUFFIX: slope.detach().contiguous() for name, slope in (slopes or {}).items()}
    carried = lora.carried(swap.model)
    files = [FILE_NAME] if tensors or carried is None else []
    files += [LORA_NAME] if carried is not None else []
    _refuse_others(folder, files)
    said = describe(swap, base_model_of(target, swap.model) if base_model is None else base_model)
    drawn = swap.drawn if drawn is None else drawn
    said |= {"drawn": {name: [plain(value) for value in values] for name, values in drawn.items()}} if drawn else {}
    component = component or component_of(target, swap.model)
    said |= {"component": component} if component is not None else {}
    if FILE_NAME in files:
        with written(folder / FILE_NAME) as temporary:
            save_file(tensors, temporary, _metadata(said, names))
    if carried is not None:
        lora.write(swap.model, carried, folder / LORA_NAME)
    write_json(folder / CONFIG_NAME, {**said, "files": files})
    return [folder / name for name in (*files, CONFIG_NAME)]


def _one(swaps: list[ModelSwap]) -> list[ModelSwap]:
    if len(swaps) != 1:
        raise ValueError(
            f"save needs one swapped model, found {len(swaps)}: call diffattn.apply or diffattn.load first"
        )
    return swaps


def _tensors(swap: ModelSwap, include: Iterable[str]) -> tuple[list[str], dict[str, Tensor]]:
    """Names of the parameters that are written, and all tensors."""
    names = sorted({name for name in (*swap.replaced_parameters, *include) if ".lora_" not in name})
    parameters = dict(swap.model.named_parameters())
    unknown = [name for name in names if stored_name(name, parameters) not in parameters]
    if unknown:
        raise ValueError(f"include= names {unknown[0]!r}, which is no parameter of {type(swap.model).__name__}")
    tensors: dict[str, Tensor] = {name: parameters[stored_name(name, parameters)] for name in names}
    tensors |= {f"{layer}.processor.{key}": value for layer, key, value in mechanism_weights(swap)}
    return names, {name: value.detach().contiguous() for name, value in tensors.items()}


def _refuse_others(folder: Path, files: list[str]) -> None:
    """Raise where the folder holds the weights of another adapter, which would be loaded along with this one."""
    for name in {FILE_NAME, LORA_NAME} - set(files):
        if (folder / name).exists():
            raise ValueError(f"{folder / name} belongs to another adapter: delete it, or save to another folder")


def describe(swap: ModelSwap, base_model: str) -> dict[str, Any]:
    """What an adapter says of itself; raises `ValueError` for a swap of several mechanisms, which no file holds."""
    if len(swap.mechanisms) > 1:
        raise ValueError(
            f"expected one mechanism to save; got {', '.join(map(str, swap.mechanisms))}; apply and save one at a time"
        )
    return {
        "mechanism": swap.mechanism.to_dict(),
        "layers": list(swap.layers),
        "model": type(swap.model).__name__,
        "base_model": base_model,
        "diffattn_version": _own_version(),
    }


def _metadata(said: dict[str, Any], names: list[str]) -> dict[str, str]:
    """The same for a safetensors header, where values are text."""
    return {
        "format": "pt",
        "diffattn": "1",
        "mechanism": json.dumps(said["mechanism"]),
        "layers": json.dumps(said["layers"]),
        "projections": json.dumps(names),
        "model": said["model"],
        **({"component": said["component"]} if "component" in said else {}),
        "base_model": said["base_model"],
        **({"drawn": json.dumps(said["drawn"])} if "drawn" in said else {}),
    }


def component_of(target: Any, model: nn.Module) -> str | None:
    """The name of a model in a pipeline that has several; None for others."""
    parts = {} if isinstance(target, nn.Module) else getattr(target, "components", {})
    names = [name for name in COMPONENTS if parts.get(name) is not None]
    return next((name for name in names if parts[name] is model), None) if len(names) > 1 else None


def _own_version() -> str:
    try:
        return version("diffattn")
    except PackageNotFoundError:  # a bare checkout
        return "unknown"


def base_model_of(*parts: Any) -> str:
    """The hub id that a pipeline or model was loaded from; "" where none of `parts` tells one.

    Folders of the own disk stay private, but for the hub's cache, whose paths hold the id.
    """
    for part in parts:
        name = str(getattr(getattr(part, "config", None), "_name_or_path", None) or "")
        cached = re.search(r"models--([^/\\]+)--([^/\\]+)", name)
        if cached:
            return f"{cached[1]}/{cached[2]}"
        if is_hub_id(name):
            return name
    return ""


def is_hub_id(name: str) -> bool:
    """Has it the form owner/name, and is it no folder here?"""
    return re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name) is not None and not Path(name).exists()


def push(folder: Path, names: Iterable[str], repo_id: str | None = None) -> str:
    """Upload `names` and a README.md of the folder to a hub repository, made where it is missing; returns its id."""
    from huggingface_hub import HfApi

    api = HfApi()
    repo: str = api.create_repo(repo_id or folder.resolve().name, exist_ok=True).repo_id
    api.upload_folder(repo_id=repo, folder_path=folder, allow_patterns=sorted({*names, "README.md"}))
    return repo
