"""A file's tensors into the parameters of a model and of its swapped layers, and the way back."""

import functools
import logging
from collections.abc import Callable

import torch
from torch import Tensor

from ..swap.model_swap import ModelSwap

logger = logging.getLogger("diffattn")


@torch.no_grad()
def fill(
    swap: ModelSwap,
    read: Callable[[str], Tensor],
    parameters: dict[str, Tensor],
    own: dict[str, Tensor],
    keep_original: bool,
    named: Callable[[str], str] = str,
) -> None:
    """Give the model's `parameters` and the mechanism's `own` what `read` gives for their names, which the file has by
    `named`.

    `restore` gives the parameters back what they had, unless `keep_original` is False.
    """
    originals = (
        {name: parameter.detach().to("cpu", copy=True) for name, parameter in parameters.items()}
        if keep_original
        else None
    )
    for name, parameter in {**parameters, **own}.items():
        parameter.copy_(read(named(name)).view(parameter.shape))
    swap.replaced_parameters = frozenset(parameters)
    if parameters:
        # partial functions, so that in a deep copy they are about the copy's parameters
        exchange = functools.partial(_exchange, parameters, originals)
        swap.on_undo(exchange, exchange if keep_original else _nothing)


def _nothing() -> None:
    """Parameters that kept an adapter's values have them still."""


@torch.no_grad()
def _exchange(parameters: dict[str, Tensor], held: dict[str, Tensor] | None) -> None:
    """Give the parameters the values that are held, and hold those that they had."""
    if held is None:
        logger.warning(
            "keep_original=False: %d parameters keep the adapter's values; reload the model", len(parameters)
        )
        return
    for name, parameter in parameters.items():
        other = parameter.detach().to("cpu", copy=True)
        parameter.copy_(held[name])
        held[name] = other
