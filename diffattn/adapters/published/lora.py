"""LoRAs that go with published projections or gates, in the names that diffusers takes.

    <module>.lora_A.weight, <module>.lora_B.weight      or lora_down, lora_up; `.default` may stand before `.weight`
    <module>.alpha                                      a number; else the metadata's `alpha`, else the rank

W = base + alpha / rank B A. The factor goes into B, so that rank and alpha are alike for peft.
"""

import re
from dataclasses import dataclass

from torch import Tensor

from ..files import Adapter
from .layout import Layout

_FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<factor>A|B|down|up)(?:\.default)?\.weight")
_FACTORS = {"A": "A", "down": "A", "B": "B", "up": "B"}


def is_of_lora(name: str) -> bool:
    """Is it one of a LoRA's tensors?"""
    return ".lora_" in name


@dataclass(frozen=True)
class RenamedLora(Adapter):
    """A LoRA of a published file, under diffusers' names."""

    source: Adapter
    places: dict[str, str]
    """Its name in the file."""
    alphas: dict[str, str]
    """Module -> the file's name of its alpha."""
    alpha: float | None
    """For modules without one of their own; None: the rank."""

    @classmethod
    def of(cls, file: Adapter, layout: Layout) -> "RenamedLora":
        places, alphas = {}, {}
        for name in file.shapes:
            found = _FACTOR.fullmatch(name)
            if found is not None:
                module = layout.module(found["module"])
                places[f"transformer.{module}.lora_{_FACTORS[found['factor']]}.weight"] = name
            elif name.endswith(".alpha") and file.shapes[name] in ((), (1,)):
                alphas[layout.module(name.removesuffix(".alpha"))] = name
            else:
                places[f"transformer.{layout.module(name)}"] = name  # which no LoRA has: it is named as unexpected
        given = file.metadata.get("alpha", file.metadata.get("lora_alpha"))
        try:
            alpha = None if given is None else float(given)
        except ValueError as error:
            raise ValueError(f"alpha in the metadata of {file.path} must be a number, got {given!r}") from error
        shapes = {name: file.shapes[own] for name, own in places.items()}
        return cls(file.path, shapes, {}, file, places, alphas, alpha)

    def tensor(self, name: str) -> Tensor:
        found = self.source.tensor(self.places[name])
        module, _, factor = name.removeprefix("transformer.").rpartition(".lora_")
        if factor != "B.weight":
            return found
        own = self.alphas.get(module)
        alpha = self.alpha if own is None else float(self.source.tensor(own))
        return found if alpha is None else found * (alpha / found.shape[1])

    def tensors(self) -> dict[str, Tensor]:
        return {name: self.tensor(name) for name in self.shapes}

    def check_finite(self) -> None:
        self.source.check_finite()
