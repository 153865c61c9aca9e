"""What was found of a model, to print and to read."""

from collections.abc import Sequence
from dataclasses import dataclass

from ..families import Family
from .checks import Check, counted
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

    @property
    def lines(self) -> list[str]:
        """What is known of it, to print."""
        call = self.calls[0]
        head = f"{self.pattern}: {counted(len(self.layers), 'layer')}"
        head += f", {len(self.calls)} calls each" if len(self.calls) > 1 else ""
        shapes = f"q, k, v {call.query}"
        if not call.query == call.key == call.value:
            shapes = f"q {call.query}, " + (
                f"k, v {call.key}" if call.key == call.value else f"k {call.key}, v {call.value}"
            )
        shapes += f", mask {call.mask}" if call.mask else ", no mask"
        shapes += ", causal" if call.causal else ""
        by = call.processor or "no processor"
        return [
            head,
            f"  {shapes}; {by}, {'out of reach' if call.unreachable else 'in reach'}",
            f"  {self.verdict}: {self.told}",
        ]


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

    @property
    def _outcome(self) -> str:
        if self.row is None:
            return "none can be written, see below what is missing"
        if not self.passed:
            return "the one below fails" if self.checks else "the one below is refused by apply"
        still = [counted(self.open, "open question")] if self.open else []
        still += [f"{len(self.missing)} missing"] if self.missing else []
        return "the one below passes its checks" + (f", with {' and '.join(still)}" if still else "")

    @property
    def open(self) -> int:
        """How many checks these inputs leave open."""
        return sum(check.passed is None for check in self.checks)

    def __str__(self) -> str:
        known = f"the row {self.known_row!r} has it already" if self.known_row else "no row has it yet"
        lines = [line for kind in self.kinds for line in kind.lines]
        parts = [f"{self.model}: {known}; {self._outcome}"]
        parts.append(_block("attention in one forward, (batch, heads, tokens, numbers)", lines))
        parts.append(_block("grid, found in", self.grids))
        if self.row is not None:
            parts.append(_block("reader to write, in diffattn/families/readers.py", self.readers.splitlines()))
            parts.append(_block(f"row to try, in diffattn/families/{self.file}", self.row.splitlines()))
            parts.append(_block("checks", self.checks))
        parts.append(_block("missing", self.missing))
        if self.row is not None:
            parts.append(
                "The suite asks more of a row: gradients, other sizes, other mechanisms (see CONTRIBUTING.md)."
            )
        return "\n\n".join(part for part in parts if part)


def _block(title: str, lines: Sequence[object]) -> str:
    told = [f"  {line}".rstrip() for line in lines]
    return "\n".join([f"{title}:", *told]) if told else ""
