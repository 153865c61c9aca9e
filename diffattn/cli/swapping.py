"""What the commands' options say of a swap, and the swap itself."""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..adapters import load
from ..parallel.image import shard
from ..swap.apply import Handle, apply
from .arguments import parse_mechanism, parse_options


@dataclass(frozen=True)
class Swap:
    """What to swap: a mechanism with options, or an adapter that says its own and whose options these override."""

    mechanism: str | None
    options: Sequence[str] = ()
    layers: Sequence[str] | None = None
    steps: slice | None = None
    backend: str = "auto"
    adapter: str | None = None
    weight_name: str | None = None
    reuse: int = 1
    exact_frames: tuple[int, int] = (0, 0)
    parallel: bool = False
    """Split the rows of the image among the processes of `mesh`."""
    mesh: Any = None

    def __post_init__(self) -> None:
        if self.parallel and not self.wanted:
            raise ValueError("--parallel splits clear's local attention: add --mechanism clear or --adapter")
        if self.mechanism and self.adapter:
            raise ValueError("give --mechanism or --adapter, not both: an adapter says its own mechanism")
        if self.adapter and self.layers:
            raise ValueError("an adapter says its own layers: leave --layers out")
        if self.weight_name and not self.adapter:
            raise ValueError("--weight-name is a file of an adapter: add --adapter")
        placed = self.layers or self.steps or self.backend != "auto" or self.reuse > 1 or any(self.exact_frames)
        if not self.wanted and (self.options or placed):
            raise ValueError(
                "-o, --layers, --swap-steps, --backend, --reuse and --exact-frames need a --mechanism or an --adapter"
            )

    @property
    def wanted(self) -> bool:
        return self.mechanism is not None or self.adapter is not None

    def __str__(self) -> str:
        return self.mechanism or f"adapter {self.adapter}"

    def put(self, pipe: Any) -> Handle | None:
        """Swap the attention of `pipe`; None where nothing is to be swapped."""
        handle = self._put_whole(pipe)
        return shard(pipe, self.mesh) if self.parallel else handle

    def _put_whole(self, pipe: Any) -> Handle | None:
        if self.adapter is not None:
            options: dict[str, Any] = {**parse_options(self.options)}
            foreign = options.keys() & inspect.signature(load).parameters.keys()
            if foreign:
                raise ValueError(
                    f"-o is for options of the adapter's mechanism, and {min(foreign)} is none: leave it out"
                )
            places = {name: value for name, value in self._places.items() if name != "layers"}
            return load(pipe, self.adapter, weight_name=self.weight_name, **places, **options)
        if self.mechanism is None:
            return None
        chosen = parse_mechanism(self.mechanism, self.options)
        return apply(pipe, chosen, **self._places)

    def for_stages(self) -> dict[str, Any]:
        """The arguments of `generate_large` that swap the stages alone."""
        if self.mechanism is None or self.parallel:
            return {"mechanism": self.put if self.wanted else None}
        return {"mechanism": parse_mechanism(self.mechanism, self.options), "apply_options": self._places}

    @property
    def _places(self) -> dict[str, Any]:
        return {
            "layers": self.layers,
            "steps": self.steps,
            "backend": self.backend,
            "reuse": self.reuse,
            "exact_frames": self.exact_frames,
        }
