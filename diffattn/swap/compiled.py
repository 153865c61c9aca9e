"""A swapped layer as one operator of `torch.compile`.

    out, situation = diffattn::attend(q, k, v, mask, features, weights, scale, layer)

The compiler sees shapes alone: `out` is (b, h, n, c) like the queries. What the call is (its grid, its step, whether
`steps=` leaves it to the model's own attention) is looked up when the operator runs, and the mechanism runs as it does
without a compiler, with compiled kernels of its own where its backend has them. So a graph serves all sizes, steps and
layers of one kind, in any number of threads. `layer` is a tensor with the layer's number, because numbers are
constants of a graph and contents of tensors are not.

`situation` is saved for the backward pass, which computes the mechanism again with gradients and costs one further
forward of it. CUDA graphs are kept off the operator: they would replay one call's grid and step in all others.

torch.export traces a mechanism's own operations, for the one size that it is given. Position ids have no values then;
there the program calls `diffattn::attend_at`, which reads the grid from the ids of each call. It needs diffattn where
it runs.
"""

import itertools
import weakref
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .. import config
from ..families import flux_ids
from ..mechanisms.base import Context, Mechanism
from ..mechanisms.sequences import attend_sequence
from .calls.inputs import Inputs
from .calls.situation import COLUMNS, Situation


class Layer(Protocol):
    """What the operator runs: `diffattn.swap.layer.SwappedLayer`."""

    weights: nn.Module | None

    def compute(self, given: Inputs, situation: Situation | None = None) -> tuple[Tensor, Situation]:
        """The layer's output and what the call was; with a given `situation` nothing is looked up."""
        ...


_layers: "weakref.WeakValueDictionary[int, Any]" = weakref.WeakValueDictionary()
_numbers = itertools.count()


def enter(layer: Any) -> Tensor:
    """A number for the layer, as the tensor that the operator takes."""
    number = next(_numbers)
    _layers[number] = layer
    with torch.inference_mode(False):
        return torch.tensor(number, device="cpu")


def opaque() -> bool:
    """Is torch.compile tracing? Not torch.export, whose program must carry the mechanism's own operations."""
    return torch.compiler.is_compiling() and not torch.compiler.is_exporting()


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    features: Tensor | None,
    scale: float | None,
    layer: Any,
) -> Tensor:
    """The operator's output; what autocast would do to the arguments of an attention function is done here."""
    if torch.is_autocast_enabled(query.device.type):
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    weights = [] if layer.weights is None else list(layer.weights.parameters())
    out, _ = torch.ops.diffattn.attend(query, key, value, mask, features, weights, scale, layer.key, COLUMNS)
    return out


_TAGS = tuple(tag for tag in [getattr(torch._C.Tag, "cudagraph_unsafe", None)] if tag is not None)


@torch.library.custom_op("diffattn::attend", mutates_args=(), tags=_TAGS)
def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    features: Tensor | None,
    weights: list[Tensor],
    scale: float | None,
    layer: Tensor,
    columns: int,
) -> tuple[Tensor, Tensor]:
    out, situation = _layers[int(layer)].compute(Inputs(query, key, value, mask, features, scale))
    aliases = any(out.data_ptr() == given.data_ptr() for given in (query, key, value))
    return out.clone() if aliases else out.contiguous(), situation.to_tensor(len(query))


@_attend.register_fake
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    features: Tensor | None,
    weights: list[Tensor],
    scale: float | None,
    layer: Tensor,
    columns: int,
) -> tuple[Tensor, Tensor]:
    # Of the arguments alone: compiled programs are kept on disk and outlive this code.
    out = value.new_empty((*query.shape[:3], value.shape[3]))
    return out, query.new_empty((query.shape[0], columns), dtype=torch.float64, device="cpu")


@torch.library.custom_op("diffattn::attend_backward", mutates_args=(), tags=_TAGS)
def _attend_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    features: Tensor | None,
    weights: list[Tensor],
    scale: float | None,
    layer: Tensor,
    situation: Tensor,
) -> list[Tensor]:
    owner = _layers[int(layer)]
    with _autograd():
        q, k, v = (tensor.detach().requires_grad_() for tensor in (query, key, value))
        features = None if features is None else features.detach().requires_grad_()
        out, _ = owner.compute(Inputs(q, k, v, mask, features, scale), Situation.from_tensor(situation))
        own = [] if owner.weights is None else owner.weights.parameters()
        wanted = [q, k, v, *([] if features is None else [features]), *own]
        found = torch.autograd.grad(out, wanted, grad, allow_unused=True)
    return [
        torch.zeros_like(tensor, memory_format=torch.contiguous_format) if one is None else one.clone().contiguous()
        for one, tensor in zip(found, wanted, strict=True)
    ]


@_attend_backward.register_fake
def _(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    features: Tensor | None,
    weights: list[Tensor],
    scale: float | None,
    layer: Tensor,
    situation: Tensor,
) -> list[Tensor]:
    given = [] if features is None else [features]
    return [tensor.new_empty(tensor.shape) for tensor in (query, key, value, *given, *weights)]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, mask, features, weights, scale, layer, _ = inputs
    ctx.scale, ctx.weights = scale, len(weights)
    ctx.save_for_backward(query, key, value, mask, features, layer, output[1], *weights)


def _backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Any, ...]:
    query, key, value, mask, features, layer, situation, *weights = ctx.saved_tensors
    q, k, v, *own = torch.ops.diffattn.attend_backward(
        grad, query, key, value, mask, features, weights, ctx.scale, layer, situation
    )
    seen = None if features is None else own.pop(0)
    return q, k, v, None, seen, own, None, None, None


_attend.register_autograd(_backward, setup_context=_setup)


class _autograd:
    """Gradients inside an operator, where the dispatcher has left them behind."""

    def __init__(self) -> None:
        excluded = torch._C._dispatch_tls_local_exclude_set()
        for name in ("AutogradCPU", "AutogradCUDA", "AutogradMPS", "AutogradXPU", "AutogradOther", "ADInplaceOrView"):
            key = getattr(torch._C.DispatchKey, name, None)
            excluded = excluded if key is None else excluded.remove(key)
        self._keys = torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), excluded)
        self._grad = torch.enable_grad()

    def __enter__(self) -> None:
        self._keys.__enter__()
        self._grad.__enter__()

    def __exit__(self, *exception: Any) -> None:
        self._grad.__exit__(*exception)
        self._keys.__exit__(*exception)


def attend_at(given: Inputs, ids: Tensor, mechanism: Mechanism, backend: str) -> Tensor:
    """The operator of an exported program, whose grid is that of Flux's position `ids`."""
    out: Tensor = torch.ops.diffattn.attend_at(
        given.query, given.key, given.value, given.mask, ids, given.scale, config.to_json(mechanism), backend
    )
    return out


@torch.library.custom_op("diffattn::attend_at", mutates_args=())
def _attend_at(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    ids: Tensor,
    scale: float | None,
    mechanism: str,
    backend: str,
) -> Tensor:
    own: Mechanism = config.from_json(mechanism)
    whole, layouts = Inputs(query, key, value, mask, None, scale), flux_ids(nn.Module(), {"img_ids": ids})
    samples = [whole] if len(layouts) == 1 else [whole.sample(i) for i in range(len(layouts))]
    outs = []
    for layout, given in zip(layouts, samples, strict=True):
        grid, context = layout.grid(key.shape[2]), Context(mask=given.mask)
        grids, qkv = (grid, *layout.further(grid)), (given.query, given.key, given.value)
        outs.append(attend_sequence(own, *qkv, grids, scale=scale, backend=backend, context=context))
    return torch.cat(outs).contiguous()


@_attend_at.register_fake
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    ids: Tensor,
    scale: float | None,
    mechanism: str,
    backend: str,
) -> Tensor:
    return value.new_empty((*query.shape[:3], value.shape[3]))
