"""Swap the attention of a model or pipeline, and put it back.

`apply` looks the model's family up and decides what can be done (`swap.plan`), wraps the processors of the chosen
layers (`swap.intercept`), and hangs torch forward pre-hooks on the model that read the token grid and the step
(`swap.model_swap`). Weights, modules and other models are not touched. Everything is checked before anything is
changed; `restore` undoes it bit for bit.
"""

import contextlib
import functools
import logging
from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from ..mechanisms.base import Mechanism
from .calls.steps import single_models
from .exact import exact_layers, undo
from .layer import SwappedLayer
from .model_swap import ModelSwap, current
from .plan import Mechanisms, attention_modules, plan, plan_all, resolve, resolve_all
from .settings.placement import ComponentChoice, LayerChoice, Placement, StepChoice
from .settings.quality import with_level

logger = logging.getLogger("diffattn")


class Handle:
    """What `apply` returns: restores what it swapped, by `restore()` or at the end of a `with` block.

    After a `with` block the model has what it had before: its own attention, or the swap that was in place.
    """

    def __init__(self, swaps: list[ModelSwap], former: list[ModelSwap] | None = None) -> None:
        self._swaps = swaps
        self._former = former or []

    @property
    def layers(self) -> list[SwappedLayer]:
        """The swapped layers of all models."""
        return [layer for swap in self._swaps for layer in swap.layers.values()]

    def parameters(self) -> Iterator[nn.Parameter]:
        """The mechanism's own trainable weights, for an optimizer."""
        for layer in self.layers:
            if layer.weights is not None:
                yield from layer.weights.parameters()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """The models' own attention inside the `with` block, the swap left in place: a teacher's pass in distillation.

        It holds for this thread. Blocks that gradient checkpointing computes again must be done before it begins.
        """
        with contextlib.ExitStack() as stack:
            for swap in self._swaps:
                stack.enter_context(swap.paused())
            yield

    def restore(self) -> None:
        """Put the models' own attention back; raises `ValueError` where all is back already or was swapped anew."""
        placed = [swap for swap in self._swaps if _in_place(swap)]
        if not placed:
            raise ValueError(f"this handle's swap of {self._swaps[0].name} is no longer in place: nothing to restore")
        for swap in self._swaps:
            if swap in placed:
                swap.undo()
            else:
                logger.warning("this handle's swap of %s is no longer in place: left as it is", swap.name)

    def __enter__(self) -> "Handle":
        return self

    def __exit__(self, *exception: object) -> None:
        mine = [swap for swap in self._swaps if _in_place(swap)]
        for swap in mine:
            swap.undo()
        for former in self._former:
            model = former.ref()
            if model is None or current(model) is not None or all(swap.ref() is not model for swap in mine):
                continue
            if former.returns:
                former.put_back()
            else:
                logger.warning("the former swap of %s cannot be put back: make it again", former.name)

    def __repr__(self) -> str:
        parts = [f"{len(s.layers)} layers of {s.name}" for s in self._swaps]
        return f"<Handle {' and '.join(map(str, self._swaps[0].mechanisms))}: {', '.join(parts)}>"


def _in_place(swap: ModelSwap) -> bool:
    model = swap.ref()
    return model is not None and current(model) is swap


LEFT_OPEN = "start", "reuse"
"""Arguments of `apply` that are None where a level, or else `Placement`, says them."""


def apply(
    target: Any,
    mechanism: Mechanisms | str,
    *,
    layers: LayerChoice = None,
    quality: str | None = None,
    steps: StepChoice = None,
    start: float | None = None,
    end: float = 1.0,
    shares: Sequence[float] = (),
    backend: str = "auto",
    components: ComponentChoice = None,
    min_tokens: int = 0,
    reuse: int | None = None,
    exact_frames: tuple[int, int] = (0, 0),
    **options: Any,
) -> Handle:
    """Swap the attention of `target` for `mechanism`; a second call replaces the first.

    Args:
        target: a `DiffusionPipeline`, a `ModularPipeline` or a model.
        mechanism: a config like `ClearAttention(radius=16)`, or its short name with the config's fields as `options`;
            or one config for each of several globs, `{"*.attentions.*": .., "*temp_attentions*": ..}`; or a `Recipe`,
            which has a schedule for every layer.
        layers: glob or globs on dotted layer names (`"single_transformer_blocks.*"`), or a predicate. None: every
            layer that the mechanism is meant for. Cross-attention to text is never swapped.
        quality: of `"routing"`: "high", "balanced" or "fast", settings of its options, of `start` and of `reuse`; what
            is given beside it counts.
        steps: a slice of the denoising steps, or a predicate on a step's number; the others stay dense.
        start, end: the same as shares of the schedule: step i of n is swapped where `start <= i / n < end`, so that
            `start=0.2` leaves the first of 4 steps dense and the first ten of 50. They count from pure noise: at
            `strength=0.5` image-to-image begins at 0.5. None: 0, or what `quality` says.
        shares: of `routing`: its `share`, in equal parts of the schedule from `start` to `end`, one after the other.
        backend: kernel by name, see `diffattn.kernels`; "auto" chooses and logs its choice.
        components: name or names of the pipeline's parts to swap. None: its unet and its transformers.
        min_tokens: leave the model's own attention in calls with fewer tokens.
        reuse: compute a layer's attention in one of so many steps, the first and the last included, and use its output
            again between them: one output for each layer and sample is kept. Works with `"softmax"` too. None: 1, or
            what `quality` says.
        exact_frames: how many of a video's first and of its last latent frames see all tokens and are seen by all,
            `(1, 1)` for one each, as video VAEs treat them apart. Of n frames each costs about 2/n of full attention.

    Raises `ValueError`, with nothing changed, for unknown names and options, values of another type, families that are
    not known, globs that match nothing, and mechanisms that the model cannot carry.
    """
    where: dict[str, Any] = {
        "layers": layers,
        "steps": steps,
        "start": start,
        "end": end,
        "shares": shares,
        "backend": backend,
        "components": components,
        "min_tokens": min_tokens,
        "reuse": reuse,
        "exact_frames": exact_frames,
    }
    if quality is not None:
        with_level(mechanism, quality, options, where)
    placement = Placement(
        **{name: value for name, value in where.items() if value is not None or name not in LEFT_OPEN}
    )
    return commit(plan_all(target, resolve_all(mechanism, layers, **options), placement))


def commit(swaps: list[ModelSwap], trained: bool = False) -> Handle:
    """Put planned swaps in place; `trained` where weights made for the mechanism come along."""
    former = [swap for swap in (current(swap.model) for swap in swaps) if swap is not None]
    for swap in swaps:
        for mechanism in swap.mechanisms:
            if not (trained or mechanism.exact or mechanism.approximates):
                _say_untrained(mechanism.type)
        swap.put_in_place(swap.install())
        for mechanism in swap.mechanisms:
            count = sum(mechanism in layer.schedule.mechanisms for layer in swap.layers.values())
            logger.info("%s on %d layers of %s", mechanism, count, swap.name)
    return Handle(swaps, former)


@functools.cache  # once per mechanism
def _say_untrained(name: str) -> None:
    logger.warning(
        "%s takes the place of the attention that the model was trained with: expect other images; load weights "
        "trained for it by diffattn.load, or keep the first quarter of the steps dense by steps=",
        name,
    )


def attn_processors(
    model: nn.Module,
    mechanism: Mechanism | str,
    *,
    layers: LayerChoice = None,
    backend: str = "auto",
    min_tokens: int = 0,
    **options: Any,
) -> dict[str, Any]:
    """Processors for `model.set_attn_processor`, with the keys of `model.attn_processors`.

    It hangs the reader of the grid on the model; setting the processors makes the swap. Layers that are not swapped
    keep their own. `restore(model)` undoes both. Arguments and errors as in `apply`; `ValueError` also for a model
    without `set_attn_processor`.
    """
    own = getattr(model, "attn_processors", None)
    if own is None:
        raise ValueError(f"{type(model).__name__} has no set_attn_processor in diffusers: use diffattn.apply")
    placement = Placement(layers=layers, backend=backend, min_tokens=min_tokens)
    swap = plan(model, placement.schedule(resolve(mechanism, **options)), placement)
    modules = attention_modules(model)
    # some models of diffusers (HunyuanDiT's ControlNet) give None for their own
    kept = {
        key: modules[key.removesuffix(".processor")].processor if value is None else value for key, value in own.items()
    }
    made = {f"{name}.processor": processor for name, processor in swap.install().items()}
    return {**kept, **made}


def restore(target: Any) -> None:
    """Undo `apply` and `apply_exact` on a pipeline or model, bit for bit; raises `ValueError` where nothing is swapped.

    Layers whose processor something else has replaced since are left alone and named in a warning.
    """
    swaps, exact = swaps_of(target), exact_layers(target)
    if not swaps and not exact:
        raise ValueError(f"nothing to restore: no attention of this {type(target).__name__} is swapped")
    for swap in swaps:
        swap.undo()
    undo(exact)


def swaps_of(target: Any) -> list[ModelSwap]:
    """The swaps in place on a model, or on any part of a pipeline."""
    parts = [target] if isinstance(target, nn.Module) else getattr(target, "components", {}).values()
    found = [current(model) for model in single_models(part for part in parts if isinstance(part, nn.Module))]
    return [swap for swap in found if swap is not None]
