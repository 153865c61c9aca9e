"""Other mechanisms for other heads.

    out_h = mechanism_p(h)(q_h, k_h, v_h),    p(h) = heads[h mod length of heads]

Each mechanism computes its heads together, so a layer costs what its parts cost. Which head has which is fixed, or
comes from a recipe, which may give every layer a `per_head` of its own.

Sources: Fu et al., MoA: Mixture of Sparse Attention for Automatic Large Language Model Compression,
https://arxiv.org/abs/2406.14909, windows of another length for every head, chosen on data; Lin et al., S2-Attention:
Hardware-Aware Context Sharding Among Attention Heads, https://arxiv.org/abs/2407.17678, another part of the context for
every head. Here the parts may be any mechanisms.
"""

from dataclasses import dataclass
from typing import Annotated, Any

from ... import config
from ...config import register
from ...options import Must, shown
from ..base import Context, Mechanism
from ..parts.heads import ByHead

WORDS = "two or more mechanisms, such as 'clear(radius=8),routing(share=0.3)'"


@register("per_head")
@dataclass(frozen=True, kw_only=True)
class PerHeadAttention(ByHead):
    """Mechanisms by head. Time: the sum of its parts', each for its share of the heads.

    >>> print(PerHeadAttention(mechanisms="clear(radius=8),linear", heads=(0, 0, 1)))
    per_head(mechanisms=clear(radius=8),linear(), heads=(0, 0, 1))
    """

    mechanisms: Annotated[tuple[Mechanism, ...] | str, Must(WORDS)]
    """Mechanisms, their dicts, or texts such as `clear(radius=8)`, with commas between."""
    heads: tuple[int, ...] | None = None
    """Number of the mechanism of each head, counted from 0; further heads begin again. None: in turn."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "mechanisms", _mechanisms(self.mechanisms))
        super().__post_init__()
        count = len(self.mechanisms)
        if self.heads is not None and sorted(set(self.heads)) != list(range(count)):
            raise ValueError(
                f"per_head: heads must name each of the {count} mechanisms, as the numbers 0 to {count - 1}, got "
                f"heads={self.heads}"
            )
        turned = [str(part) for part in self.every_part if getattr(part, "ntk_factor", 1.0) != 1.0]
        if turned:
            raise ValueError(
                f"per_head: ntk_factor changes the positions of all heads of a model, got {turned[0]}; leave it out"
            )

    def parts(self, context: Context) -> tuple[Mechanism, ...]:
        return self.mechanisms  # type: ignore[return-value]

    @property
    def period(self) -> tuple[int, ...]:
        return tuple(range(len(self.mechanisms))) if self.heads is None else self.heads

    @property
    def kinds(self) -> frozenset[str]:  # type: ignore[override]
        """Layers that all parts take by default."""
        return frozenset.intersection(*(part.kinds for part in self.every_part))

    @property
    def across_frames(self) -> bool:  # type: ignore[override]
        return all(part.across_frames for part in self.every_part)

    @property
    def joins_grids(self) -> bool:  # type: ignore[override]
        return all(part.joins_grids for part in self.every_part)

    @property
    def one_mask(self) -> bool:  # type: ignore[override]
        return any(part.one_mask for part in self.every_part)

    @property
    def needs_steps(self) -> bool:
        return any(part.needs_steps for part in self.every_part)

    @property
    def scales(self) -> bool:
        return all(part.scales for part in self.every_part)

    def __str__(self) -> str:
        heads = "" if self.heads is None else f", heads={self.heads}"
        return f"per_head(mechanisms={','.join(map(str, self.every_part))}{heads})"


def _mechanisms(given: Any) -> tuple[Mechanism, ...]:
    """What `mechanisms` may be, as mechanisms."""
    several = config.parted(given) if isinstance(given, str) else given
    if not isinstance(several, (tuple, list)) or len(several) < 2:
        raise ValueError(f"per_head: mechanisms must be {WORDS}, got {shown(given)}")
    return tuple(_mechanism(one) for one in several)


def _mechanism(given: Any) -> Mechanism:
    if isinstance(given, dict):
        given = config.from_dict(given)
    elif isinstance(given, str):
        given = config.from_text(given, f"per_head: mechanisms must be {WORDS}")
    if not isinstance(given, Mechanism):
        raise ValueError(f"per_head: mechanisms must be {WORDS}, got {shown(given)}")
    return given
