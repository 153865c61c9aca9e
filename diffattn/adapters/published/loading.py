"""Published weights, checked against a swap and put in place."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from ...families import family_of
from ...mechanisms.base import Mechanism
from ...swap.model_swap import ModelSwap
from ...swap.plan import resolve
from .. import lora
from ..checks import check_names, check_writable, mechanism_weights
from ..files import Adapter
from ..filling import fill
from .layout import Layout
from .lora import RenamedLora, is_of_lora

WRAPPER = "_checkpoint_wrapped_module."
"""What torch's activation checkpointing puts into names."""


@dataclass(frozen=True)
class Several(Adapter):
    """Files of one model as one, by names without `WRAPPER`."""

    places: dict[str, tuple[Adapter, str]]
    """The file of each name, and its name there."""

    @classmethod
    def of(cls, files: Sequence[Adapter]) -> "Several":
        places: dict[str, tuple[Adapter, str]] = {}
        for file in files:
            for name in file.shapes:
                plain = name.replace(WRAPPER, "")
                if plain in places:
                    raise ValueError(f"{plain} is in {places[plain][0].path.name} and again in {file.path.name}")
                places[plain] = file, name
        shapes = {name: file.shapes[own] for name, (file, own) in places.items()}
        return cls(files[0].path, shapes, dict(files[0].metadata), places)

    def tensor(self, name: str) -> Tensor:
        file, own = self.places[name]
        return file.tensor(own)

    def tensors(self) -> dict[str, Tensor]:
        return {name: self.tensor(name) for name in self.shapes}

    def check_finite(self) -> None:
        for file in {id(file): file for file, _ in self.places.values()}.values():
            file.check_finite()

    def without(self, names: Iterable[str]) -> "Several":
        """The same but for some tensors."""
        left = self.shapes.keys() - set(names)
        shapes = {name: shape for name, shape in self.shapes.items() if name in left}
        return replace(self, shapes=shapes, places={name: self.places[name] for name in shapes})


@dataclass(frozen=True)
class Published:
    """Files whose keys are those of published weights."""

    file: Several
    layout: Layout

    def mechanism(self, options: dict[str, Any], model: nn.Module) -> Mechanism:
        """That of the layout; raises `ValueError` for models that are no Wan."""
        if family_of(model).name != "Wan":
            raise ValueError(
                f"{self.file.path.name} holds {self.layout.kind} weights for Wan, and the target is "
                f"{type(model).__name__}"
            )
        return resolve(self.layout.kind, **options)

    def own(self, swap: ModelSwap) -> dict[str, Tensor]:
        """Name in the file -> the mechanism's weight of every swapped layer."""
        return {self.layout.of_layer(layer, key): value for layer, key, value in mechanism_weights(swap)}

    def parameters(self, swap: ModelSwap) -> dict[str, Tensor]:
        """Name in the model -> the parameters that the file replaces: all, or none where it is not a whole model."""
        others = self.file.shapes.keys() - self.own(swap).keys()
        if not others or any(map(is_of_lora, others)):
            return {}
        return {_plain(name): value for name, value in swap.model.named_parameters() if ".lora_" not in name}

    def expected(self, swap: ModelSwap) -> dict[str, tuple[int, ...]]:
        """Shapes by name in the file, without a LoRA's."""
        replaced = {self.layout.of_parameter(name): value for name, value in self.parameters(swap).items()}
        shapes = {name: tuple(value.shape) for name, value in self.own(swap).items()}
        return shapes | {name: self._shape_of(name, value) for name, value in replaced.items()}

    def check(self, swap: ModelSwap, target: Any, keep_original: bool) -> list[Callable[[], None]]:
        """Raise where the files do not fit; returns what puts them in place."""
        own, parameters = self.own(swap), self.parameters(swap)
        rest = self.file.without(own)
        has_lora = any(map(is_of_lora, rest.shapes))
        check_names(self.file.without(rest.shapes) if has_lora else self.file, self.expected(swap))
        check_writable(swap, parameters)
        self.file.check_finite()
        named = {name: self.layout.of_parameter(name) for name in parameters}
        read = self.file.tensor
        actions: list[Callable[[], None]] = [
            lambda: fill(swap, read, parameters, own, keep_original, lambda name: named.get(name, name))
        ]
        if has_lora:
            adapter = RenamedLora.of(rest, self.layout)
            lora.check(adapter, swap)
            actions.append(lambda: lora.add(swap, adapter, None if isinstance(target, nn.Module) else target))
        return actions

    def _shape_of(self, name: str, value: Tensor) -> tuple[int, ...]:
        """What a parameter's tensor must be; TurboDiffusion's patch embedding is a matrix."""
        shape, given = tuple(value.shape), self.file.shapes.get(name)
        flat = (shape[0], value[0].numel())
        return flat if value.dim() == 5 and given == flat else shape


def _plain(name: str) -> str:
    """A parameter's own name, where PEFT keeps it under `base_layer`."""
    return name.replace(".base_layer.", ".")


def recognise(files: Sequence[Adapter]) -> Published | None:
    """Published weights by their keys; None for all others, and for files that say their mechanism themselves."""
    if any("mechanism" in file.metadata for file in files):
        return None
    file = Several.of(files)
    layout = Layout.of(file.shapes)
    return None if layout is None else Published(file, layout)
