"""The model's own windows in bounded memory: the same numbers, nothing to train.

LTX-2.5's diffusion decoder attends in windows over (frames, rows, columns). Before any call that `apply` could take,
its own processor makes the window a mask of tokens x tokens; so the whole processor is replaced here. Projections,
norms and rotary embedding are the layer's (`project_qkv`), the window is `NeighborhoodAttention` of the layer's own
`kernel_size`. The decoder makes no mask for a processor of another class.
"""

import logging
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from ..grid import TokenGrid
from ..mechanisms.neighborhood import NeighborhoodAttention
from .calls.frames import Ref

logger = logging.getLogger("diffattn")

LAYER = "LTX2VideoVaeNeighborhoodAttention"
"""Class of the attention modules that are served, by name."""
OWN = ("LTX2VideoVaeNeighborhoodAttnProcessor", "LTX2VideoVaeNeighborhoodNattenProcessor")
"""Classes of their processors: both compute the window alone."""
FLEX = ("flex", "_native_flex", None)
"""Backends of diffusers that choose no other kernel than the family's own; None: none is chosen."""


class ExactWindowProcessor:
    """Computes what the processor of one layer computes, in bounded memory."""

    # diffusers sets both on every processor that has them
    _attention_backend: Any = "flex"
    _parallel_config: Any = None

    def __init__(self, original: Any, window: tuple[int, int, int], backend: str) -> None:
        self.original = original
        """The processor of the model's own."""
        self.mechanism = NeighborhoodAttention(kernel_size=window)
        self.mechanism.check_backend(backend)
        self.backend = backend

    def __call__(self, attn: Any, hidden_states: Tensor, block_mask: Any = None) -> Tensor:
        """`hidden_states` and result `(b, frames, rows, columns, c)`; `block_mask` is not read, as in NATTEN's."""
        _check_settings(self)
        shape = hidden_states.shape[1:4]
        frames, height, width = shape
        grid = TokenGrid(height, width, frames)
        q, k, v = (part.flatten(1, 3).transpose(1, 2) for part in attn.project_qkv(hidden_states))
        out = self.mechanism.attend(q, k, v, grid, scale=1.0, backend=self.backend)  # q is scaled already
        projected: Tensor = attn.to_out[0](out.transpose(1, 2).flatten(2).unflatten(1, shape))
        return projected

    def __str__(self) -> str:
        return f"its own window, {self.mechanism}, in bounded memory [{self.backend}]"


class ExactHandle:
    """What `apply_exact` returns: restores the processors, by `restore()` or at the end of a `with` block.

    After a `with` block the layers have what they had before it.
    """

    def __init__(self, placed: dict[str, tuple[Ref[Any], ExactWindowProcessor, Any]]) -> None:
        self._placed = placed
        """Dotted name -> layer, the processor that was put there, and the one before it."""

    @property
    def layers(self) -> list[str]:
        """Dotted names of the layers."""
        return [*self._placed]

    def restore(self) -> None:
        """Put the model's own processors back; raises `ValueError` where none of this handle's is in place."""
        layers = self._in_place()
        if not layers:
            raise ValueError("this handle's processors are no longer in place: nothing to restore")
        for name, (ref, processor, _) in self._placed.items():
            module: Any = ref()
            if name in layers:
                module.processor = processor.original
            elif module is not None:
                logger.warning("%s carries %s now: left as it is", name, type(module.processor).__name__)

    def _in_place(self) -> dict[str, Any]:
        """The layers that still have what this handle's call gave them."""
        found = {name: ref() for name, (ref, _, _) in self._placed.items()}
        return {
            name: module
            for name, module in found.items()
            if module is not None and module.processor is self._placed[name][1]
        }

    def __enter__(self) -> "ExactHandle":
        return self

    def __exit__(self, *exception: object) -> None:
        for name, module in self._in_place().items():
            module.processor = self._placed[name][2]

    def __repr__(self) -> str:
        return f"<ExactHandle: {len(self._placed)} layers>"


def apply_exact(target: Any, *, backend: str = "auto") -> ExactHandle:
    """Compute the windows that a model was trained with in bounded memory: the same numbers, nothing to train.

    Args:
        target: an `LTX2VideoDiffusionDecoderModel`, or a pipeline with one. Its own processors make masks of tokens x
            tokens; here memory grows with the number of tokens alone.
        backend: kernel by name, see `diffattn.kernels`; "auto" chooses and logs its choice.

    A second call replaces the first. Undone by the handle, or by `diffattn.restore`. Raises `ValueError`, with nothing
    changed, where there is no such model, and where a layer's processor is not the model's own.
    """
    layers = {name: (module, _made(name, module, backend)) for name, module in _layers(target)}
    if not layers:
        raise ValueError(
            f"expected a model that attends in windows of its own, LTX2VideoDiffusionDecoderModel, or a pipeline with "
            f"one; got {type(target).__name__}{_parts(target)}; diffattn.apply swaps the attention of other models"
        )
    placed = {}
    for name, (module, processor) in layers.items():
        placed[name] = Ref(module), processor, module.processor
        module.processor = processor
    logger.info("the own windows of %d layers of %s in bounded memory", len(layers), type(target).__name__)
    return ExactHandle(placed)


def exact_layers(target: Any) -> dict[str, Any]:
    """Dotted name -> layer, of those that `apply_exact` has changed."""
    return {name: module for name, module in _layers(target) if isinstance(module.processor, ExactWindowProcessor)}


def exact_models(target: Any) -> list[nn.Module]:
    """The models that have such layers."""
    return [model for _, model in _models(target) if exact_layers(model)]


def undo(layers: dict[str, Any]) -> None:
    """Give `exact_layers` their own processors back."""
    for module in layers.values():
        module.processor = module.processor.original


def _models(target: Any) -> Iterator[tuple[str, nn.Module]]:
    """The models of a pipeline with what their names begin with, or the model itself."""
    if isinstance(target, nn.Module):
        yield "", target
        return
    parts = getattr(target, "components", None)
    parts = parts if isinstance(parts, dict) else {}
    yield from ((f"{name}.", part) for name, part in parts.items() if isinstance(part, nn.Module))


def _layers(target: Any) -> Iterator[tuple[str, Any]]:
    """Dotted names and layers, each layer once."""
    known: set[int] = set()
    for prefix, model in _models(target):
        for name, module in model.named_modules():
            if LAYER in [cls.__name__ for cls in type(module).__mro__] and id(module) not in known:
                known.add(id(module))
                yield prefix + name, module


def _parts(target: Any) -> str:
    if isinstance(target, nn.Module):
        return ""
    return f" with {', '.join(f'{name[:-1]} {type(part).__name__}' for name, part in _models(target)) or 'no models'}"


def _made(name: str, layer: Any, backend: str) -> ExactWindowProcessor:
    """The processor for a layer; raises `ValueError` for a layer that computes something else."""
    processor = layer.processor
    own = processor.original if isinstance(processor, ExactWindowProcessor) else processor
    if type(own).__name__ not in OWN:
        raise ValueError(
            f"expected {name} with a processor of its family, {' or '.join(OWN)}; got {type(own).__name__}, which may "
            f"compute something else; set the model's own back first"
        )
    _check_settings(own)
    return ExactWindowProcessor(own, tuple(layer.kernel_size), backend)


def _check_settings(processor: Any) -> None:
    """Raise `ValueError` for what diffusers has set on a processor and this one cannot serve."""
    found = getattr(processor, "_attention_backend", "flex")
    if getattr(found, "value", found) not in FLEX:
        raise ValueError(
            f"expected the attention backend of the decoder's own, flex; set_attention_backend chose {found}; set "
            f"flex again, and choose a kernel by diffattn.apply_exact(backend=)"
        )
    if getattr(processor, "_parallel_config", None) is not None:
        raise ValueError(
            "expected all tokens of the decoder on one rank; got context parallelism, under which a rank lacks "
            "neighbours; decode on one rank"
        )
