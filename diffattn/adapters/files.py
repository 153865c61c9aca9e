"""The files of an adapter: which they are, what they say of themselves, where they are found.

    adapter.safetensors               weights of the mechanism, and parameters that take the places of the model's own
    pytorch_lora_weights.safetensors  a LoRA, in diffusers' format
    diffattn_config.json              what the others are: mechanism, layers, model class, base model, version

The first says all of that in its metadata too, and can go alone. Diffusers' format has no place for it: a LoRA needs
the third beside it.
"""

import json
import logging
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_origin

from safetensors import SafetensorError, safe_open
from torch import Tensor

from .. import config
from ..files.weights import check_finite, check_numbers, shards
from ..mechanisms.base import Mechanism
from ..options import shown
from ..swap.plan import resolve

logger = logging.getLogger("diffattn")

FILE_NAME = "adapter.safetensors"
LORA_NAME = "pytorch_lora_weights.safetensors"
CONFIG_NAME = "diffattn_config.json"
INDEX = ".safetensors.index.json"
DTYPES = ("F64", "F32", "F16", "BF16")
"""What tensors may be, as safetensors calls it."""
PICKLES = (".pth", ".pt", ".ckpt", ".bin")
OFFICIAL_NAME = re.compile(r"clear_local_(?P<radius>\d+)(?:_down_(?P<down_factor>\d+))?")


@dataclass(frozen=True)
class Adapter:
    """A weights file of an adapter, opened but not read: shapes by tensor name, and what is said of it."""

    path: Path
    shapes: dict[str, tuple[int, ...]]
    metadata: dict[str, str]
    """Those of the file, over what `diffattn_config.json` says where that names the file."""

    @classmethod
    def open(cls, path: Path, said: dict[str, Any] | None = None) -> "Adapter":
        """Read the header; a broken file raises `ValueError` with its name. `said` is what the folder's config says."""
        if path.suffix in PICKLES:
            raise ValueError(
                f"{path} is a pickle, which can run code, and adapters are safetensors files: convert it once by "
                f"safetensors.torch.save_file(torch.load({path.name!r}, map_location='cpu', weights_only=True), ..)"
            )
        try:
            with safe_open(path, framework="pt") as file:
                slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
                shapes = {name: tuple(part.get_shape()) for name, part in slices.items()}
                dtypes = {name: part.get_dtype() for name, part in slices.items()}
                own = file.metadata() or {}
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} is not a whole safetensors file ({error}); download or save it again") from error
        check_numbers(dtypes, path, DTYPES)
        return cls(path, shapes, {**_as_metadata(said, path.name), **own})

    def tensors(self) -> dict[str, Tensor]:
        """All tensors of the file, of the shapes and dtypes that it has, on the CPU."""
        with safe_open(self.path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in self.shapes}

    def tensor(self, name: str) -> Tensor:
        """One of them, of the shape that `shapes` has."""
        with safe_open(self.path, framework="pt") as file:
            found: Tensor = file.get_tensor(name)
        return found

    def check_finite(self) -> None:
        """Raise `ValueError` for NaN or infinity; one tensor is in memory at a time."""
        with safe_open(self.path, framework="pt") as file:
            check_finite(((name, file.get_tensor(name)) for name in self.shapes), self.path)

    @property
    def is_lora(self) -> bool:
        """Does the file hold a LoRA, in diffusers' own format?"""
        return self.path.name == LORA_NAME or any(".lora_" in name for name in self.shapes)

    def mechanism(self, options: dict[str, Any]) -> Mechanism:
        """The mechanism of the metadata, or CLEAR by the file name; `options` override either.

        Raises `ValueError` where neither says one, and for options that the mechanism does not have.
        """
        if "mechanism" in self.metadata:
            values = self.said("mechanism", dict[str, Any])
            try:
                mechanism: Mechanism = config.from_dict({**values, **options})
            except ValueError as error:
                raise ValueError(f"the mechanism of {self.path.name}: {error}") from error
            self._warn_of_untrained(mechanism)
            return mechanism
        name = OFFICIAL_NAME.search(self.path.name)
        found = {key: int(value) for key, value in name.groupdict().items() if value} if name else {}
        if self.is_lora and not found:
            raise ValueError(
                f"{self.path.name} is a LoRA, and no {CONFIG_NAME} beside it says its mechanism: put that file there, "
                f"or load it by load_lora_weights and call diffattn.apply"
            )
        if not found and "radius" not in options:
            raise ValueError(
                f"{self.path.name} does not say its mechanism: pass radius=... (and down_factor=...) for a CLEAR file"
            )
        return resolve("clear", **{**found, **options})

    @property
    def drawn(self) -> dict[str, Any]:
        """Options of the mechanism, and the values that one training had of them; empty where it had one of each."""
        return self.said("drawn", dict[str, Any]) if "drawn" in self.metadata else {}

    def _warn_of_untrained(self, mechanism: Mechanism) -> None:
        """Say where an option lies outside of what the weights were trained for."""
        for name, values in self.drawn.items():
            own = config.plain(getattr(mechanism, name, None))
            numbers = all(isinstance(value, (int, float)) for value in (own, *values))
            if not (min(values) <= own <= max(values) if numbers else own in values):
                logger.warning(
                    "%s was trained for %s from %s, and is used with %s: expect other images",
                    self.path.name,
                    name,
                    ", ".join(map(str, values)),
                    own,
                )

    @property
    def layers(self) -> list[str] | None:
        """Names of the layers it was made for; None: all that the mechanism takes."""
        return self.said("layers", list[str]) if "layers" in self.metadata else None

    @property
    def projections(self) -> list[str] | None:
        """Names of the model's parameters it holds; None: the attention projections of every layer."""
        return self.said("projections", list[str]) if "projections" in self.metadata else None

    def said(self, name: str, kind: Any) -> Any:
        """A value of the metadata, in JSON there; `ValueError` where it is broken, or not of the `kind`."""
        try:
            value = json.loads(self.metadata[name])
        except (ValueError, RecursionError) as error:
            raise ValueError(
                f"{name} in the metadata of {self.path} is not valid JSON ({error}): download or save it again"
            ) from error
        outer = get_origin(kind)
        if not isinstance(value, outer) or (outer is list and not all(isinstance(item, str) for item in value)):
            what = "a list of names" if outer is list else "an object"
            raise ValueError(
                f"{name} in the metadata of {self.path} must be {what}, got {shown(value)}: download or save it again"
            )
        return value


def _as_metadata(said: dict[str, Any] | None, name: str) -> dict[str, str]:
    """What a config says of the file `name`, in the form of safetensors' metadata."""
    if said is None or name not in said["files"]:
        return {}
    return {
        "mechanism": json.dumps(said["mechanism"]),
        "layers": json.dumps(said["layers"]),
        "model": said["model"],
        **({"component": str(said["component"])} if said.get("component") else {}),
        "base_model": said.get("base_model", ""),
        **({"drawn": json.dumps(said["drawn"])} if "drawn" in said else {}),
    }


def open_all(
    source: str | os.PathLike[str], weight_name: str | None, subfolder: str | None, **hub: Any
) -> list[Adapter]:
    """The adapter's weights files in a folder, at a path, or in a hub repository, opened.

    Raises `ValueError` for files that are missing, broken or not clearly chosen.
    """
    path = Path(source)
    if path.is_file():
        folder, names = path.parent, [path.name]
    elif path.is_dir():
        folder = path / (subfolder or "")
        names = _choose(folder, weight_name)
    elif path.is_absolute() or str(source).count("/") != 1:
        raise ValueError(f"{source} is neither a file, a folder nor a hub repository such as 'Huage001/CLEAR'")
    else:
        return _open_from_hub(str(source), weight_name, subfolder, **hub)
    said = read_config(folder / CONFIG_NAME) if (folder / CONFIG_NAME).is_file() else None
    return [Adapter.open(path, said) for name in names for path in _parts(folder / name)]


def _parts(path: Path) -> list[Path]:
    """The files that an index names, or the file itself."""
    return [path.parent / name for name in shards(path)] if path.name.endswith(INDEX) else [path]


def _choose(folder: Path, weight_name: str | None) -> list[str]:
    """The names of the weights files that a folder's adapter has."""
    found = sorted(path.name for path in folder.glob("*.safetensors"))
    if weight_name is not None:
        names, who = [weight_name], "file"
    elif (folder / CONFIG_NAME).is_file():
        names, who = read_config(folder / CONFIG_NAME)["files"], f"file of its {CONFIG_NAME},"
    else:
        indices = sorted(path.name for path in folder.glob(f"*{INDEX}"))
        names = [name for name in (FILE_NAME, LORA_NAME) if name in found] or (indices if len(indices) == 1 else found)
        if len(names) not in (1, 2) or (len(names) == 2 and names != [FILE_NAME, LORA_NAME]):
            raise ValueError(
                f"{folder} has {len(found)} safetensors files ({', '.join(found)}): choose one by weight_name="
            )
        return names
    for name in names:
        if not (folder / name).is_file():
            raise ValueError(f"{folder} has no {who} {name}; it has {', '.join(found) or 'no safetensors file'}")
    return names


def _open_from_hub(repo: str, weight_name: str | None, subfolder: str | None, **hub: Any) -> list[Adapter]:
    """Download what a repository's config names, or the one file, and open it."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    def fetch(name: str) -> Path:
        return Path(hf_hub_download(repo, name, subfolder=subfolder, **hub))

    said = None
    if weight_name in (None, LORA_NAME):
        try:
            said = read_config(fetch(CONFIG_NAME))
        except EntryNotFoundError:
            said = None  # an adapter from before there was one: its file says all
    names = [weight_name] if weight_name else said["files"] if said else [FILE_NAME]
    for name in [name for name in names if name.endswith(INDEX)]:
        names = [fetch(part).name for part in shards(fetch(name))]
    return [Adapter.open(fetch(name), said) for name in names]


def read_config(path: Path) -> dict[str, Any]:
    """`diffattn_config.json`, with the fields that loading needs; `ValueError` where it is broken."""
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}): download or save the adapter again") from error
    kinds = {"mechanism": dict, "layers": list, "model": str, "files": list}
    wrong = [name for name, kind in kinds.items() if not isinstance(said, dict) or not isinstance(said.get(name), kind)]
    if wrong:
        raise ValueError(f"{path} has no {wrong[0]}, or another kind of value there: save the adapter again")
    if not all(isinstance(name, str) for name in said["layers"]):
        raise ValueError(f"layers in {path} must be names, got {shown(said['layers'])}: save the adapter again")
    # The files lie beside it: a name from a stranger's repository leads nowhere else.
    if not said["files"] or not all(isinstance(name, str) and Path(name).name == name for name in said["files"]):
        raise ValueError(f"files in {path} must be names of files beside it, got {said['files']}")
    return dict(said)
