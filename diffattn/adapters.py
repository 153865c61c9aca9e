"""Adapters: the weights that a mechanism brings along, and the projections trained to it, in one safetensors file.

Tensors carry the names of the model's own parameters (`transformer_blocks.0.attn.to_q.weight`); the mechanism's own
weights lie under their layer's `processor` (`transformer_blocks.0.attn.processor.spatial_weight`), as in the files that
CLEAR released. Ours say in the metadata what they are: mechanism, layers, model class. CLEAR's have no metadata; their
radius and pooling factor are read from the file name or given.

Loading is strict: every missing, unexpected and misshapen tensor is named, and nothing is changed before all is well.
"""

import functools
import json
import logging
import os
import re
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from . import config
from .mechanisms.base import Mechanism
from .model_swap import ModelSwap
from .plan import StepChoice, models_of, plan_all, resolve
from .swap import Handle, commit, swaps_of

logger = logging.getLogger("diffattn")

FILE_NAME = "adapter.safetensors"
OFFICIAL_NAME = re.compile(r"clear_local_(?P<radius>\d+)(?:_down_(?P<down_factor>\d+))?")
PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0")


@dataclass(frozen=True)
class Adapter:
    """An adapter file, opened but not read: shapes by tensor name, and what the metadata say."""

    path: Path
    shapes: dict[str, tuple[int, ...]]
    metadata: dict[str, str]

    @classmethod
    def open(cls, path: Path) -> "Adapter":
        """Read the header; a broken file raises `ValueError` with its name."""
        try:
            with safe_open(path, framework="pt") as file:
                shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
                return cls(path, shapes, file.metadata() or {})
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} is not a whole safetensors file ({error}); download or save it again") from error

    def tensors(self) -> dict[str, Tensor]:
        with safe_open(self.path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in self.shapes}

    def mechanism(self, options: dict[str, Any]) -> Mechanism:
        """The mechanism of the metadata, or CLEAR by the file name; `options` override either."""
        if "mechanism" in self.metadata:
            values = {**json.loads(self.metadata["mechanism"]), **options}
            return config.from_dict(values)
        name = OFFICIAL_NAME.search(self.path.name)
        found = {key: int(value) for key, value in name.groupdict().items() if value} if name else {}
        if not found and "radius" not in options:
            raise ValueError(
                f"{self.path.name} does not say its mechanism: pass radius=... (and down_factor=...) for a CLEAR file"
            )
        return resolve("clear", **{**found, **options})

    @property
    def layers(self) -> list[str] | None:
        """Names of the layers it was made for; None: all that the mechanism takes."""
        return json.loads(self.metadata["layers"]) if "layers" in self.metadata else None

    @property
    def projections(self) -> list[str] | None:
        """Names of the model's parameters it holds; None: the attention projections of every layer."""
        return json.loads(self.metadata["projections"]) if "projections" in self.metadata else None


def load(
    target: Any,
    source: str | os.PathLike[str],
    *,
    weight_name: str | None = None,
    subfolder: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    steps: StepChoice = None,
    backend: str = "auto",
    components: Iterable[str] | None = None,
    min_tokens: int = 0,
    keep_original: bool = True,
    **options: Any,
) -> Handle:
    """`apply` with an adapter's weights: ours, or an official CLEAR file.

    Args:
        source: a file, a folder or a hub repository; the hub arguments are those of `load_lora_weights`.
        keep_original: keep the weights that the adapter replaces, on the CPU, so that `restore` is bit-exact.
        options: override what the adapter says of its mechanism, such as `radius=8` or `ntk_factor=10`.

    Raises `ValueError`, with nothing changed, for a file that is broken or belongs to another model, and for
    projections that are fused, quantized or not in memory.
    """
    adapter = Adapter.open(
        find_file(
            source,
            weight_name,
            subfolder,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
        )
    )
    models = models_of(target, components)
    if len(models) != 1:
        names = ", ".join(type(model).__name__ for model in models)
        raise ValueError(f"an adapter belongs to one model, but the target has {names}: name one by components=[...]")
    check_class(adapter, models[0])
    mechanism = adapter.mechanism(options)
    [swap] = plan_all(target, mechanism, adapter.layers, steps, backend, components, min_tokens)
    parameters = expected_parameters(swap, adapter.projections)
    own = {f"{name}.processor.{key}": value for name, key, value in mechanism_weights(swap)}
    check_names(adapter, {name: tuple(value.shape) for name, value in {**parameters, **own}.items()})
    check_writable(swap, parameters)
    handle = commit([swap], trained=True)
    _fill(swap, adapter.tensors(), parameters, own, keep_original)
    return handle


def save(
    target: Any,
    folder: str | os.PathLike[str],
    *,
    include: Iterable[str] = (),
    push_to_hub: bool = False,
    repo_id: str | None = None,
) -> Path:
    """Write the adapter of a swapped model or pipeline to `folder`; returns the file.

    It holds the mechanism's own weights, the projections that `load` replaced, and the model's parameters named in
    `include` (after training them). `push_to_hub` uploads the folder to `repo_id` (default: the folder's name).
    """
    swaps = swaps_of(target)
    if len(swaps) != 1:
        raise ValueError(
            f"save needs one swapped model, found {len(swaps)}: call diffattn.apply or diffattn.load first"
        )
    [swap] = swaps
    names = sorted({*swap.replaced_parameters, *include})
    parameters = dict(swap.model.named_parameters())
    unknown = [name for name in names if _stored_name(name, parameters) not in parameters]
    if unknown:
        raise ValueError(f"include= names {unknown[0]!r}, which is no parameter of {type(swap.model).__name__}")
    tensors: dict[str, Tensor] = {name: parameters[_stored_name(name, parameters)] for name in names}
    tensors |= {f"{layer}.processor.{key}": value for layer, key, value in mechanism_weights(swap)}
    metadata = {
        "format": "pt",
        "diffattn": "1",
        "mechanism": json.dumps(swap.mechanism.to_dict()),
        "layers": json.dumps(list(swap.layers)),
        "projections": json.dumps(names),
        "model": type(swap.model).__name__,
        "base_model": str(getattr(swap.model.config, "_name_or_path", "") or ""),
    }
    path = Path(folder) / FILE_NAME
    _write({name: value.detach().contiguous() for name, value in tensors.items()}, metadata, path)
    if push_to_hub:
        _push(Path(folder), repo_id or Path(folder).name)
    return path


def find_file(source: str | os.PathLike[str], weight_name: str | None, subfolder: str | None, **hub: Any) -> Path:
    """The adapter file in a folder, at a path, or in a hub repository."""
    path = Path(source)
    if path.is_file():
        return path
    if path.is_dir():
        folder = path / (subfolder or "")
        if weight_name is not None:
            if not (folder / weight_name).is_file():
                found = ", ".join(_safetensors(folder)) or "no safetensors file"
                raise ValueError(f"{folder} has no file {weight_name}; it has {found}")
            return folder / weight_name
        names = [FILE_NAME] if (folder / FILE_NAME).is_file() else _safetensors(folder)
        if len(names) != 1:
            raise ValueError(
                f"{folder} has {len(names)} safetensors files ({', '.join(names)}): choose one by weight_name="
            )
        return folder / names[0]
    if path.is_absolute() or str(source).count("/") != 1:
        raise ValueError(f"{source} is neither a file, a folder nor a hub repository such as 'Huage001/CLEAR'")
    from huggingface_hub import hf_hub_download

    return Path(hf_hub_download(str(source), weight_name or FILE_NAME, subfolder=subfolder, **hub))


def check_class(adapter: Adapter, model: nn.Module) -> None:
    """Raise where the adapter names another model class."""
    wanted = adapter.metadata.get("model")
    if wanted is not None and wanted not in {cls.__name__ for cls in type(model).__mro__}:
        raise ValueError(f"{adapter.path.name} is an adapter of {wanted}, but the target is {type(model).__name__}")


def expected_parameters(swap: ModelSwap, names: list[str] | None) -> dict[str, Tensor]:
    """File name -> the model's parameter for everything the adapter must hold beside the mechanism's weights.

    `names` None is the official layout: weight and bias of q, k, v and the image's output of every swapped layer.
    """
    parameters = dict(swap.model.named_parameters())
    if names is None:
        names = [
            f"{layer}.{projection}.{kind}"
            for layer in swap.layers
            for projection in PROJECTIONS
            for kind in ("weight", "bias")
            if _stored_name(f"{layer}.{projection}.{kind}", parameters) in parameters
        ]
    stored = {name: _stored_name(name, parameters) for name in names}
    missing = [name for name, key in stored.items() if key not in parameters]
    if missing:
        raise ValueError(f"the adapter replaces {missing[0]}, which {type(swap.model).__name__} does not have")
    return {name: parameters[key] for name, key in stored.items()}


def check_writable(swap: ModelSwap, parameters: dict[str, Tensor]) -> None:
    """Raise where the parameters to be replaced are fused, quantized or not in memory."""
    for name, layer in swap.layers.items():
        if parameters and getattr(layer.module, "fused_projections", False):
            raise ValueError(f"{name} has fused q, k and v: call unfuse_qkv_projections() first")
    all_parameters = dict(swap.model.named_parameters())
    for name, parameter in parameters.items():
        module = swap.model.get_submodule(_stored_name(name, all_parameters).rpartition(".")[0])
        if type(module) is not nn.Linear or type(parameter.data) is not Tensor or not parameter.is_floating_point():
            raise ValueError(
                f"{name} is quantized ({type(module).__name__}, {parameter.dtype}): load the adapter before "
                f"quantizing, or use a LoRA adapter"
            )
        if parameter.is_meta:
            raise ValueError(f"{name} is not in memory (meta device): load the adapter before offloading")


def mechanism_weights(swap: ModelSwap) -> list[tuple[str, str, Tensor]]:
    """Layer, name and tensor of the mechanism's own weights."""
    return [
        (name, key, value)
        for name, layer in swap.layers.items()
        if layer.weights is not None
        for key, value in layer.weights.state_dict(keep_vars=True).items()
    ]


def check_names(adapter: Adapter, wanted: dict[str, tuple[int, ...]]) -> None:
    """Raise `ValueError` that names every missing, unexpected and misshapen tensor."""
    missing = [name for name in wanted if name not in adapter.shapes]
    unexpected = [name for name in adapter.shapes if name not in wanted]
    misshapen = [
        f"{name} is {list(shape)}, expected {list(wanted[name])}"
        for name, shape in adapter.shapes.items()
        if name in wanted and shape != wanted[name]
    ]
    problems = [
        f"{len(names)} {title}: {', '.join(names)}"
        for title, names in (("missing", missing), ("unexpected", unexpected), ("misshapen", misshapen))
        if names
    ]
    if problems:
        raise ValueError(f"{adapter.path.name} does not fit this model. {'; '.join(problems)}")


@torch.no_grad()
def _fill(
    swap: ModelSwap,
    tensors: dict[str, Tensor],
    parameters: dict[str, Tensor],
    own: dict[str, Tensor],
    keep_original: bool,
) -> None:
    originals = (
        {name: parameter.detach().to("cpu", copy=True) for name, parameter in parameters.items()}
        if keep_original
        else None
    )
    for name, parameter in {**parameters, **own}.items():
        parameter.copy_(tensors[name])
    swap.replaced_parameters = frozenset(parameters)
    if parameters:
        swap.on_undo(_warn_on_save(swap.model))
        swap.on_undo(lambda: _give_back(parameters, originals))


@torch.no_grad()
def _give_back(parameters: dict[str, Tensor], originals: dict[str, Tensor] | None) -> None:
    if originals is None:
        logger.warning(
            "keep_original=False: %d parameters keep the adapter's values; reload the model", len(parameters)
        )
        return
    for name, parameter in parameters.items():
        parameter.copy_(originals[name])


def _warn_on_save(model: Any) -> Callable[[], None]:
    """Make `model.save_pretrained` say that it writes adapter weights; returns what undoes it."""
    plain = model.save_pretrained

    @functools.wraps(plain)
    def save_pretrained(*args: Any, **kwargs: Any) -> Any:
        logger.warning(
            "save_pretrained writes attention weights that an adapter has replaced; diffattn.save writes the adapter "
            "alone, diffattn.restore brings the model's own weights back"
        )
        return plain(*args, **kwargs)

    model.save_pretrained = save_pretrained
    return lambda: delattr(model, "save_pretrained")


def _stored_name(name: str, parameters: dict[str, nn.Parameter]) -> str:
    """A parameter's name in the model: PEFT keeps the base weights under `base_layer`."""
    module, _, kind = name.rpartition(".")
    wrapped = f"{module}.base_layer.{kind}"
    return wrapped if wrapped in parameters else name


def _safetensors(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*.safetensors"))


def _write(tensors: dict[str, Tensor], metadata: dict[str, str], path: Path) -> None:
    """Write to a temporary name, then rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, suffix=".partial")
    os.close(descriptor)
    try:
        save_file(tensors, temporary, metadata)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _push(folder: Path, repo_id: str) -> None:
    from huggingface_hub import HfApi

    api = HfApi()
    repo = api.create_repo(repo_id, exist_ok=True).repo_id
    api.upload_folder(repo_id=repo, folder_path=folder)
