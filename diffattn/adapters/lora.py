"""LoRAs: written and read in diffusers' format by diffusers, put on and taken off by peft.

A file holds `transformer.<layer>.lora_A.weight` and `lora_B.weight` (`unet.` for UNets), and rank and alpha in its
metadata. `load` adds it to the model under the name `diffattn`, so that `pipe.set_adapters(["diffattn", "style"])` sets
it beside others; like any LoRA loaded by diffusers, it is the only active one until then.
"""

import functools
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..files.writing import written
from ..swap.calls.frames import Ref
from ..swap.model_swap import ModelSwap
from .checks import check_names, check_unfused
from .files import Adapter

logger = logging.getLogger("diffattn")

NAME = "diffattn"
PREFIXES = ("transformer", "unet")
ALWAYS = ("r", "lora_alpha", "target_modules", "rank_pattern")
"""Fields that are written at their defaults too: diffusers reads them unasked, before 0.40 the last one as well."""
NEVER = ("init_lora_weights", "inference_mode", "base_model_name_or_path", "revision", "peft_version")
"""Fields of peft's config that mean something in training, or on the machine where it was made, alone."""


def carried(model: nn.Module) -> str | None:
    """Name of the LoRA that goes with the model's swap: the one that `load` added, or the only one there is."""
    configs = getattr(model, "peft_config", None) or {}
    if len(configs) > 1 and NAME not in configs:
        raise ValueError(
            f"{type(model).__name__} carries {len(configs)} LoRAs ({', '.join(configs)}), and an adapter holds one: "
            f"take the others away by delete_adapters"
        )
    if not configs:
        return None
    name = NAME if NAME in configs else next(iter(configs))
    kind = str(getattr(configs[name].peft_type, "value", configs[name].peft_type))
    if kind != "LORA":
        raise ValueError(f"{name!r} on {type(model).__name__} is a {kind}, and only LoRAs are saved: delete or fuse it")
    return name


def write(model: Any, name: str, path: Path) -> Path:
    """Write the LoRA `name` of a model, at its full weight whatever `set_adapters` gave it."""
    from diffusers.loaders.lora_base import LoraBaseMixin
    from peft.utils import get_peft_model_state_dict

    found: dict[str, Tensor] = get_peft_model_state_dict(model, adapter_name=name)
    tensors = {key: value.detach().contiguous() for key, value in found.items()}
    prefix = "unet" if "UNet" in type(model).__name__ else "transformer"
    with written(path) as temporary:
        LoraBaseMixin.write_lora_layers(
            LoraBaseMixin.pack_weights(tensors, prefix),
            str(temporary.parent),
            is_main_process=True,
            weight_name=temporary.name,
            save_function=None,
            safe_serialization=True,
            lora_adapter_metadata=LoraBaseMixin.pack_weights(facts(model.peft_config[name]), prefix),
        )
    return path


def facts(config: Any) -> dict[str, Any]:
    """The fields of a peft config that loading needs: not those left at their defaults, which other releases lack."""
    usual = type(config)().to_dict()
    return {
        key: sorted(value) if isinstance(value, set) else value
        for key, value in config.to_dict().items()
        if key in ALWAYS or (key not in NEVER and value != usual.get(key))
    }


def check(adapter: Adapter, swap: ModelSwap) -> None:
    """Raise where a LoRA file does not fit the model, or cannot be put on it."""
    if not hasattr(swap.model, "load_lora_adapter"):
        raise ValueError(f"diffusers loads no LoRA into a {type(swap.model).__name__}, and {adapter.path.name} is one")
    try:
        import peft  # noqa: F401
    except ImportError as error:
        raise ImportError('a LoRA adapter needs peft: pip install "diffattn[train]"') from error
    check_unfused(swap)
    if not adapter.shapes:
        raise ValueError(f"{adapter.path.name} holds no tensors: save or download the adapter again")
    check_names(adapter, expected_shapes(adapter, swap.model))
    _said_of_lora(adapter)


def expected_shapes(adapter: Adapter, model: nn.Module) -> dict[str, tuple[int, ...]]:
    """File name -> shape of the two factors of every layer that the file names and the model has.

    The rank is that of the file. Biases and DoRA's magnitudes are taken as they are.
    """
    prefix = prefix_of(adapter)
    start = f"{prefix}." if prefix else ""
    modules = dict(model.named_modules())
    wanted: dict[str, tuple[int, ...]] = {}
    for name, shape in adapter.shapes.items():
        layer, dot, kind = name.removeprefix(start).partition(".lora_")
        sides = _sides(modules.get(layer))
        if sides is None or not dot:
            continue
        if kind not in ("A.weight", "B.weight"):
            wanted[name] = shape
            continue
        first = f"{start}{layer}.lora_A.weight"
        rank = adapter.shapes[first][0] if first in adapter.shapes else shape[1]
        ins, outs, kernel = sides
        wanted[first] = (rank, ins, *kernel)
        wanted[f"{start}{layer}.lora_B.weight"] = (outs, rank, *(1 for _ in kernel))
    return wanted


def _sides(module: nn.Module | None) -> tuple[int, int, tuple[int, ...]] | None:
    """Inputs, outputs and kernel of a linear or convolutional layer, or of the one that peft has wrapped."""
    base: Any = getattr(module, "base_layer", module)
    if isinstance(base, nn.Conv2d):
        return base.in_channels, base.out_channels, tuple(base.kernel_size)
    if hasattr(base, "in_features") and hasattr(base, "out_features"):
        return int(base.in_features), int(base.out_features), ()
    return None


def prefix_of(adapter: Adapter) -> str | None:
    """The part of a pipeline that all tensors belong to; None: they carry the model's own names."""
    return next((p for p in PREFIXES if all(name.startswith(f"{p}.") for name in adapter.shapes)), None)


def add(swap: ModelSwap, adapter: Adapter, pipe: Any) -> None:
    """Put a checked LoRA on the swap's model, and let `restore` take it away again."""
    model: Any = swap.model
    taken = getattr(model, "peft_config", None) or {}
    name = next(name for name in (NAME, *(f"{NAME}_{i}" for i in range(1, len(taken) + 1))) if name not in taken)
    former = Former(model)
    put_on = functools.partial(_put_on, Ref(model), adapter, name, None if pipe is None else Ref(pipe))
    swap.on_undo(functools.partial(former.bring_back, name), put_on)
    put_on()


def _put_on(ref: Ref[Any], adapter: Adapter, name: str, pipe: Ref[Any] | None) -> None:
    model: Any = ref()
    said = _said_of_lora(adapter)
    try:
        model.load_lora_adapter(
            adapter.tensors(),
            prefix=prefix_of(adapter),
            adapter_name=name,
            metadata=said,
            low_cpu_mem_usage=True,  # as load_lora_weights does: the factors keep the file's dtype
            _pipeline=None if pipe is None else pipe(),
        )
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        why = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{adapter.path} cannot be put on {type(model).__name__}: {why}; save it again") from error


def _said_of_lora(adapter: Adapter) -> dict[str, Any] | None:
    """Rank, alpha and the like as the file's metadata say them, for peft."""
    from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY

    if LORA_ADAPTER_METADATA_KEY not in adapter.metadata:
        return None
    said: dict[str, Any] = adapter.said(LORA_ADAPTER_METADATA_KEY, dict[str, Any])
    return said


class Former:
    """What a model was before a LoRA came: who was active, and which parameters were to be trained."""

    def __init__(self, model: Any) -> None:
        self._model = Ref(model)
        self.active = {name: list(layer.active_adapters) for name, layer in tuned_layers(model)}
        self.trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]

    @property
    def model(self) -> Any:
        """The model, which holds the swap that holds this."""
        return self._model()

    def bring_back(self, name: str) -> None:
        """Take the LoRA `name` away; layers that it alone had wrapped are bare again."""
        self._unmerge(name)
        layers = dict(tuned_layers(self.model))
        for layer, active in ((layers[path], active) for path, active in self.active.items() if path in layers):
            if layer.active_adapters == [name]:
                layer.set_adapter([other for other in active if other in layer._all_available_adapter_names()])
        if name in (getattr(self.model, "peft_config", None) or {}):
            self.model.delete_adapters(name)
        for path, layer in list(tuned_layers(self.model)):
            if not layer._all_available_adapter_names():
                self.model.set_submodule(path, layer.get_base_layer())
        for parameter, flag in self.trained:
            parameter.requires_grad_(flag)

    def _unmerge(self, name: str) -> None:
        merged = [layer for _, layer in tuned_layers(self.model) if name in layer.merged_adapters]
        for layer in merged:
            layer.unmerge()
        if merged:
            logger.warning("the LoRA %r was fused: taking it out leaves the weights changed by rounding", name)


def tuned_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Dotted name and module of every layer that peft has wrapped."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            yield name, module
