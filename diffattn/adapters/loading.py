"""`load`: a mechanism and what was trained for it, put on a model."""

import logging
import os
from collections.abc import Callable
from typing import Any

from torch import nn

from ..options import read, shown
from ..swap.apply import Handle, commit
from ..swap.calls.frames import Ref
from ..swap.model_swap import ModelSwap
from ..swap.plan import models_of, names_in, plan_all
from ..swap.settings.placement import ComponentChoice, Placement, StepChoice
from . import lora
from .checks import check_class, check_names, check_writable, expected_parameters, mechanism_weights
from .files import FILE_NAME, Adapter, open_all
from .filling import fill
from .published import recognise
from .slopes import Leaning, is_sloped, with_slopes

logger = logging.getLogger("diffattn")


def load(
    target: Any,
    source: str | os.PathLike[str],
    *,
    weight_name: str | None = None,
    subfolder: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    steps: StepChoice = None,
    start: float = 0.0,
    end: float = 1.0,
    backend: str = "auto",
    components: ComponentChoice = None,
    min_tokens: int = 0,
    reuse: int = 1,
    exact_frames: tuple[int, int] = (0, 0),
    keep_original: bool = True,
    **options: Any,
) -> Handle:
    """`apply` with an adapter's weights: ours, an official CLEAR file, or published SLA or VSA weights for Wan.

    What is published for SLA and VSA is told by its keys (`diffattn/adapters/published`); such a file may hold all of
    the model's weights.

    Where the adapter is a LoRA, it is the same as `pipe.load_lora_weights(source)` and `apply`, on quantized models
    too; `restore` takes the LoRA away as well.

    Args:
        source: a file, a folder or a hub repository; the hub arguments are those of `load_lora_weights`.
        components: the model, of a pipeline with several; an adapter that was trained for one of them says so itself.
        keep_original: keep the weights that the adapter replaces, on the CPU, so that `restore` is bit-exact.
        options: override what the adapter says of its mechanism, such as `radius=8` or `ntk_factor=10`.

    Raises `ValueError`, with nothing changed, for files that are missing, broken or belong to another model, and for
    projections that are fused, quantized or not in memory.
    """
    if not isinstance(source, (str, os.PathLike)):
        raise ValueError(f"source must be a file, a folder or a hub repository, got {shown(source)}")
    keep_original = read("keep_original", keep_original, bool)
    weight_name, subfolder = read("weight_name", weight_name, str | None), read("subfolder", subfolder, str | None)
    hub = dict(revision=revision, token=token, cache_dir=cache_dir, local_files_only=local_files_only)
    opened = open_all(source, weight_name, subfolder, **hub)
    found = recognise(opened)
    components = _components(target, components, opened[0].metadata.get("component"))
    models = models_of(target, components)
    if len(models) != 1:
        names = ", ".join(type(model).__name__ for model in models)
        raise ValueError(f"an adapter belongs to one model, but the target has {names}: name one by components=[...]")
    for adapter in opened:
        check_class(adapter, models[0])
    mechanism = opened[0].mechanism(options) if found is None else found.mechanism(options, models[0])
    placement = Placement(
        layers=opened[0].layers,
        steps=steps,
        start=start,
        end=end,
        backend=backend,
        components=components,
        min_tokens=min_tokens,
        reuse=reuse,
        exact_frames=exact_frames,
    )
    [swap] = plan_all(target, mechanism, placement)
    if found is not None:
        actions = found.check(swap, target, keep_original)
    else:
        actions = [_check(adapter, swap, target, keep_original) for adapter in opened]
    if found is None and all(adapter.is_lora for adapter in opened) and mechanism_weights(swap):
        raise ValueError(
            f"{opened[0].path.name} is a LoRA without the weights that {mechanism} has of its own: {FILE_NAME} is "
            f"missing beside it"
        )
    swap.loaded, swap.drawn = True, {} if is_sloped(opened[0]) else opened[0].drawn
    handle = commit([swap], trained=True)
    try:
        for action in actions:
            action()
        if swap.replaced_parameters or any(adapter.is_lora for adapter in opened) or found is not None:
            saving = WarnsOfSaving(swap.model)
            swap.on_undo(saving.remove, saving.put_in_place)
    except BaseException:
        handle.restore()
        raise
    return handle


def _components(target: Any, components: ComponentChoice, said: str | None) -> ComponentChoice:
    """The model that an adapter is for: the one it names, of a pipeline that has several when it is made."""
    if said is None or isinstance(target, nn.Module) or (components is not None and names_in(components) == [said]):
        return components
    if components is None and getattr(target, "components", {}).get(said) is not None:
        return [said]
    has = f"components={names_in(components)}" if components is not None else f"a {type(target).__name__} without it"
    raise ValueError(f"the adapter was trained for {said}, and no other model of its pipeline, got {has}")


def _check(adapter: Adapter, swap: ModelSwap, target: Any, keep_original: bool) -> Callable[[], None]:
    """Raise where a file does not fit the swap; returns what puts it in place."""
    if adapter.is_lora:
        lora.check(adapter, swap)
        adapter.check_finite()
        return lambda: lora.add(swap, adapter, None if isinstance(target, nn.Module) else target)
    parameters = expected_parameters(swap, adapter.projections)
    own = {f"{name}.processor.{key}": value for name, key, value in mechanism_weights(swap)}
    shapes, sloped = {name: tuple(value.shape) for name, value in parameters.items()}, is_sloped(adapter)
    wanted = with_slopes(shapes) if sloped else shapes
    check_names(adapter, wanted | {name: tuple(value.shape) for name, value in own.items()})
    check_writable(swap, parameters)
    adapter.check_finite()
    read = Leaning(adapter, swap.mechanism) if sloped else adapter.tensor
    return lambda: fill(swap, read, parameters, own, keep_original)


class WarnsOfSaving:
    """Makes `model.save_pretrained` say that it writes adapter weights."""

    def __init__(self, model: Any) -> None:
        self._model = Ref(model)
        self.put_in_place()

    def put_in_place(self) -> None:
        """From now on."""
        model: Any = self._model()
        model.save_pretrained = self

    def remove(self) -> None:
        """No longer."""
        vars(self._model()).pop("save_pretrained", None)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        model: Any = self._model()
        logger.warning(
            "save_pretrained writes attention weights that an adapter has replaced or added; diffattn.save writes the "
            "adapter alone, diffattn.restore brings the model's own weights back"
        )
        return type(model).save_pretrained(model, *args, **kwargs)
