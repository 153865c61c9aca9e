"""What the commands' options say of a swap, and the swap itself."""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Annotated, Any

from ..adapters import load
from ..options import Help, at_least
from ..parallel.image import shard
from ..swap.apply import Handle, apply
from ..swap.settings.placement import Placement
from ..swap.settings.quality import with_level
from ..swap.settings.recipe import Recipe
from .arguments import parse_mechanism, parse_options, parse_steps


@dataclass(frozen=True, kw_only=True)
class Timing:
    """In which part of a run attention is swapped, and computed."""

    quality: Annotated[
        str | None,
        Help("Of routing, which it stands for: high, balanced or fast; what is given beside it counts."),
    ] = None
    swap_steps: Annotated[str | None, Help("Denoising steps to swap, such as 4: or :10.", metavar="SLICE")] = None
    start: Annotated[
        float | None,
        Help("Swap from this share of the schedule on, from pure noise, such as 0.2; before it attention is full."),
    ] = None
    end: Annotated[float, Help("Swap up to this share of the schedule, such as 0.95.")] = 1.0
    shares: Annotated[
        tuple[float, ...],
        Help("Of routing: its share in equal parts of the schedule, such as 0.6,0.4,0.3.", metavar="LIST"),
    ] = ()
    reuse: Annotated[
        int | None,
        at_least(1),
        Help("Compute attention in one of so many steps and the last; use its output between."),
    ] = None
    exact_frames: Annotated[
        tuple[int, int],
        Help("Latent frames of a video's start and end that all see, and they all, such as 1,0.", metavar="FIRST,LAST"),
    ] = (0, 0)

    def __post_init__(self) -> None:
        # raises here what `apply` would raise after the model is loaded
        Placement(**{name: value for name, value in self.places.items() if name != "quality" and value is not None})
        if self.quality is not None:
            with_level("routing", self.quality, {}, {})

    @property
    def places(self) -> dict[str, Any]:
        """Arguments of `apply`."""
        own = {field.name: getattr(self, field.name) for field in fields(self)}
        return {"steps": parse_steps(own.pop("swap_steps")), **own}


@dataclass(frozen=True)
class Swap:
    """What to swap: a mechanism with options, or an adapter that says its own and whose options these override."""

    mechanism: str | None
    options: Sequence[str] = ()
    layers: Sequence[str] | None = None
    timing: Timing = Timing()
    backend: str = "auto"
    adapter: str | None = None
    weight_name: str | None = None
    recipe: str | None = None
    """File of a recipe, which says mechanisms, layers, shares and reuse."""
    parallel: bool = False
    """Split the rows of the image among the processes of `mesh`."""
    mesh: Any = None

    def __post_init__(self) -> None:
        if self.parallel and not self.wanted:
            raise ValueError("--parallel splits clear's local attention: add --mechanism clear or --adapter")
        if self.timing.quality is not None and self.mechanism is None:
            object.__setattr__(self, "mechanism", "routing")
        given = [name for name in ("mechanism", "adapter", "recipe") if getattr(self, name)]
        if len(given) > 1:
            what = "a recipe and an adapter say" if self.recipe else "an adapter says"
            raise ValueError(f"give --{given[0]} or --{given[1]}, not both: {what} its own mechanism")
        if self.recipe and (self.options or self.layers or self.timing.shares or self.timing.reuse):
            raise ValueError(
                "a recipe says its own layers, shares and reuse: leave -o, --layers, --shares, --reuse out"
            )
        if self.adapter and self.layers:
            raise ValueError("an adapter says its own layers: leave --layers out")
        if self.weight_name and not self.adapter:
            raise ValueError("--weight-name is a file of an adapter: add --adapter")
        placed = self.options or self.layers or self.backend != "auto" or self.timing != Timing()
        if not self.wanted and placed:
            raise ValueError(
                "-o, --layers, --swap-steps, --start, --end, --shares, --backend, --reuse and --exact-frames need a "
                "--mechanism, an --adapter or a --recipe"
            )
        if self.adapter and self.timing.shares:
            raise ValueError("--shares are those of routing: give it by --mechanism routing, without --adapter")

    @property
    def wanted(self) -> bool:
        return self.mechanism is not None or self.adapter is not None or self.recipe is not None

    def __str__(self) -> str:
        return self.mechanism or (f"adapter {self.adapter}" if self.adapter else f"recipe {self.recipe}")

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
            own = ("layers", "shares", "quality")
            places = {name: value for name, value in self._places.items() if name not in own}
            return load(pipe, self.adapter, weight_name=self.weight_name, **places, **options)
        if self.recipe is not None:
            places = {name: own for name, own in self._places.items() if name not in ("layers", "shares", "reuse")}
            return apply(pipe, Recipe.load(self.recipe), **places)
        if self.mechanism is None:
            return None
        return apply(pipe, **self.asked)

    def for_stages(self) -> dict[str, Any]:
        """The arguments of `generate_large` that swap the stages alone."""
        if self.mechanism is None or self.parallel:
            return {"mechanism": self.put if self.wanted else None}
        if self.timing.quality is not None:
            return {"mechanism": self.put}
        return {"mechanism": parse_mechanism(self.mechanism, self.options), "apply_options": self._places}

    @property
    def asked(self) -> dict[str, Any]:
        """Mechanism, its options and the rest of `apply`'s arguments."""
        assert self.mechanism is not None
        if self.timing.quality is None:
            return {"mechanism": parse_mechanism(self.mechanism, self.options), **self._places}
        return {"mechanism": self.mechanism, **parse_options(self.options), **self._places}

    @property
    def _places(self) -> dict[str, Any]:
        places = {"layers": self.layers, "backend": self.backend, **self.timing.places}
        return {name: value for name, value in places.items() if value is not None}
