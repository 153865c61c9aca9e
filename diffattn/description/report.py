"""What was found of a model, to print and to read."""

from collections.abc import Sequence
from dataclasses import dataclass

from ..families import Family
from .checks import Check
from .watching import Call


@dataclass(frozen=True)
class Kind:
    """Layers of one pattern whose calls are alike."""

    pattern: str
    """`transformer_blocks.N.attn1`"""
    layers: tuple[str, ...]
    calls: tuple[Call, ...]
    """Those of one layer in one forward."""
    verdict: str
    """"grid": the row has it; "kept": it sees no grid; "missing": it sees one, or may, and cannot be swapped."""
    told: str
    """Where its cells lie, or why it is not in the row."""

    @property
    def missing(self) -> str:
        """What keeps it out of the row; empty where nothing does."""
        return f"{self.pattern}: {self.told}" if self.verdict == "missing" else ""

    def __str__(self) -> str:
        call = self.calls[0]
        times = f" x {len(self.calls)} calls" if len(self.calls) > 1 else ""
        shapes = f"q {call.query}"
        shapes += " k v alike" if call.query == call.key == call.value else f" k {call.key} v {call.value}"
        mask = f" mask {call.mask}" if call.mask else " no mask"
        order = " causal" if call.causal else ""
        by = call.processor or "no processor"
        reach = f"{by}, {'out of reach' if call.unreachable else 'in reach'}"
        return (
            f"{self.pattern} ({len(self.layers)}){times}: {shapes}{mask}{order}; {reach}; {self.verdict}: {self.told}"
        )


@dataclass(frozen=True)
class Description:
    """A model's attention, where its grid is found, a row to try, and what is missing; `print` it."""

    model: str
    kinds: tuple[Kind, ...]
    grids: tuple[str, ...]
    """Where in the arguments the grids of the row were found."""
    missing: tuple[str, ...]
    """What stands against a swap, layer by layer."""
    row: str | None = None
    """The row as it is written in a module of `diffattn/families`; None where no layer can be named."""
    readers: str = ""
    """Readers that have to be written beside it, in `diffattn/families/readers.py`."""
    family: Family | None = None
    """The row itself."""
    checks: tuple[Check, ...] = ()
    """What the row was asked."""
    file: str = ""
    """Module of `diffattn/families` that it belongs to."""
    known_row: str | None = None
    """Name of the row that the class has already."""

    @property
    def passed(self) -> bool:
        """Is there a row that failed no check?"""
        return self.row is not None and bool(self.checks) and all(check.passed is not False for check in self.checks)

    def __str__(self) -> str:
        known = f"the row {self.known_row!r} has it already" if self.known_row else "no row has it"
        parts = [f"{self.model}: {known}", _block("attention in one forward", self.kinds)]
        parts.append(_block("grid", self.grids))
        if self.row is not None:
            parts.append(_block("reader to write, in diffattn/families/readers.py", self.readers.splitlines()))
            parts.append(_block(f"row to try, in diffattn/families/{self.file}", self.row.splitlines()))
            parts.append(_block("checks", self.checks))
            parts.append("the suite asks more: gradients, set_attn_processor, other sizes (see CONTRIBUTING.md)")
        parts.append(_block("missing", self.missing))
        return "\n".join(part for part in parts if part)


def _block(title: str, lines: Sequence[object]) -> str:
    told = [f"  {line}" for line in lines]
    return "\n".join([f"{title}:", *told]) if told else ""
