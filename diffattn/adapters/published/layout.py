"""Where published files keep what a sparse attention has of its own."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from . import wan

Kind = Literal["sla", "vsa"]
PREFIXES = ("", "net.", "model.", "diffusion_model.", "model.diffusion_model.", "transformer.")
"""What may come before all names."""
OWN = {"proj_l": "sla", "to_gate_compress": "vsa"}
"""Layers of published mechanisms, and whose they are."""
PLACES = (
    "self_attn.attn_op.local_attn.",
    "self_attn.attn_impl.",
    "self_attn.local_attn.",
    "self_attn.",
    "attn1.attn_op.local_attn.",
    "attn1.attn_impl.",
    "attn1.local_attn.",
    "attn1.",
    "",
)
"""Where they lie in a block."""
_OWN_NAME = re.compile(
    rf"(?P<prefix>{'|'.join(map(re.escape, PREFIXES))})blocks\.\d+\.(?P<place>{'|'.join(map(re.escape, PLACES))})"
    rf"(?P<layer>{'|'.join(OWN)})\.(?:weight|bias)"
)


@dataclass(frozen=True)
class Layout:
    """The names of one file."""

    kind: Kind
    prefix: str
    place: str
    """Of the mechanism's own layer in a block."""
    original: bool
    """Are the model's weights under Wan's original names? Else under diffusers'."""

    @classmethod
    def of(cls, names: Iterable[str]) -> "Layout | None":
        """By the first name of a layer of `OWN`; None where there is none.

        Raises `ValueError` where there are such layers, and none in a known place.
        """
        names = sorted(names)
        own = [name for name in names if any(f".{layer}." in f".{name}" for layer in OWN)]
        if not own:
            return None
        found = next(filter(None, map(_OWN_NAME.fullmatch, own)), None)
        if found is None:
            raise ValueError(
                f"{own[0]} is where no published weights for Wan have it: expected a name such as "
                f"blocks.0.self_attn.attn_op.local_attn.proj_l.weight or blocks.0.to_gate_compress.weight; the gates "
                f"of MiniMax-H3 and LTX-2 are of a VSA with text in its cubes, which `vsa` does not compute"
            )
        original = found["place"].startswith("self_attn") or any(".self_attn." in f".{name}" for name in names)
        kind: Kind = OWN[found["layer"]]  # type: ignore[assignment]
        return cls(kind, found["prefix"], found["place"], original)

    def of_layer(self, layer: str, key: str) -> str:
        """The name in the file of a weight of the swapped layer `blocks.N.attn1`."""
        return f"{self.prefix}{layer.removesuffix('attn1')}{self.place}{key}"

    def of_parameter(self, name: str) -> str:
        """The name in the file of a parameter of diffusers' model."""
        found = wan.to_original(name) if self.original else name
        return self.prefix + (name if found is None else found)

    def module(self, name: str) -> str:
        """diffusers' name of a module or parameter of the file; the file's where it has none."""
        own = name.removeprefix(self.prefix)
        return (wan.to_diffusers(own) or own) if self.original else own
