"""The exit of one attention processor: the place where a family's own processor asks for softmax(q k^T) v.

Every diffusers processor ends in one of two calls, `dispatch_attention_fn(q, k, v, ...)` in (b, n, h, d) or
`F.scaled_dot_product_attention(q, k, v, ...)` in (b, h, n, d). We run the family's own `__call__`, byte code and all,
with those two names bound to an `Exit`. Projections, norms, rotary embeddings, fused QKV and whatever a later release
adds stay the family's business, and no other model, class or module is touched. There is one class for each class of
processors and prefix, however many models are swapped; which layer is computed is a context variable.

What it takes to make that work, also under `torch.compile(fullgraph=True)`:

- the new function's globals belong to a real module in `sys.modules`, with `__builtins__` and `__package__` copied:
  dynamo looks globals up by module name, and processors import relatively;
- `F` becomes a copy of the module `torch.nn.functional` with one function replaced;
- keyword defaults and closure are copied, and the new `__call__` carries the signature of the old one, because
  diffusers drops every keyword that `inspect.signature(processor.__call__)` does not name;
- the class subclasses the family's own, ends in its name and is equal to it: diffusers tests the first two, and looks
  classes up in lists and tables; built anew by its class, a processor is the model's own attention;
- under torch.compile, which knows no context variables, the layer is an attribute of the exit: a graph holds it only
  while it is traced.
"""

import copy
import functools
import itertools
import pickle
import sys
import types
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import Any, NoReturn, Protocol

import torch.nn.functional
from torch import Tensor

from ..kernels.call import repeat_heads
from .helpers import DISPATCH, SDPA, attending_helpers

_serial = itertools.count()


class Layer(Protocol):
    """What an exit hands its call to: `diffattn.swap.layer.SwappedLayer`."""

    @property
    def grouped_heads(self) -> bool:
        """May several heads of queries share one of keys, or does each need its own?"""
        ...

    def wants(self, query: Tensor, key: Tensor, parallel_config: Any = None, is_causal: bool = False) -> bool:
        """Is this call the mechanism's, or the model's own attention? Both tensors are (b, h, n, d)."""
        ...

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        scale: float | None,
        parallel_config: Any = None,
    ) -> Tensor:
        """The mechanism's output, all tensors (b, h, n, d); with a `parallel_config` this rank's tokens of each."""
        ...


_computed: ContextVar[Layer | None] = ContextVar("diffattn layer", default=None)
"""The layer whose processor is running."""


class Exit:
    """Stands for the two attention functions inside one rebound `__call__`.

    With `prompts` the processor is an IP-Adapter's: what follows the layer's own attention goes to image prompts.
    """

    def __init__(self, names: dict[str, Any], prompts: bool = False) -> None:
        self._names = names
        """The globals of the family's own `__call__`."""
        self._prompts = prompts
        # an attribute of the object from the start: torch.compile would compile anew once it appears
        self.traced: Layer | None = None

    @property
    def layer(self) -> Layer | None:
        """The layer being computed."""
        return self.traced if torch.compiler.is_compiling() else _computed.get() or self.traced

    def dispatch_attention_fn(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
        attention_kwargs: dict[str, Any] | None = None,
        *,
        backend: Any = None,
        parallel_config: Any = None,
    ) -> Tensor:
        """diffusers' dispatcher, tensors (b, n, h, d)."""
        q, k, v = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        layer = self.layer
        if layer is None or not layer.wants(q, k, parallel_config, is_causal):
            own: Callable[..., Tensor] = self._names[DISPATCH]
            return own(
                query,
                key,
                value,
                attn_mask,
                dropout_p,
                is_causal,
                scale,
                enable_gqa,
                attention_kwargs,
                backend=backend,
                parallel_config=parallel_config,
            )
        _refuse(dropout_p, is_causal)
        attn_mask = _with_window(attn_mask, attention_kwargs or {}, q, k)
        k, v = repeat_heads(k, v, q.shape[1]) if enable_gqa and not layer.grouped_heads else (k, v)
        self._leave_prompts()
        return layer.attend(q, k, v, attn_mask, scale, parallel_config).transpose(1, 2)

    def scaled_dot_product_attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """torch's function, tensors (b, h, n, d)."""
        layer = self.layer
        if layer is None or not layer.wants(query, key, None, is_causal):
            return torch.nn.functional.scaled_dot_product_attention(
                query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
            )
        _refuse(dropout_p, is_causal)
        repeats = enable_gqa and not layer.grouped_heads
        key, value = repeat_heads(key, value, query.shape[1]) if repeats else (key, value)
        self._leave_prompts()
        return layer.attend(query, key, value, attn_mask, scale)

    def _leave_prompts(self) -> None:
        """Further calls, for image prompts, stay with the model whatever their keys."""
        if not self._prompts:
            return
        if torch.compiler.is_compiling():
            self.traced = None
        else:
            _computed.set(None)


def _refuse(dropout_p: float, is_causal: bool) -> None:
    if dropout_p or is_causal:
        raise NotImplementedError(
            f"swapped attention has neither dropout nor a causal order, but the model asks for "
            f"dropout_p={dropout_p}, is_causal={is_causal}; leave this layer out with layers="
        )


def _with_window(mask: Tensor | None, kernel: dict[str, Any], query: Tensor, key: Tensor) -> Tensor | None:
    """The mask together with a window (left, right) that a processor asks of the kernel itself (ACE-Step, flash)."""
    unknown = sorted(kernel.keys() - {"window_size"})
    if unknown:
        raise NotImplementedError(
            f"swapped attention has no options of the model's own kernel, but the model asks for {', '.join(unknown)}; "
            "leave this layer out with layers="
        )
    left, right = kernel.get("window_size", (-1, -1))
    if max(left, right) < 0:
        return mask
    ahead = torch.arange(key.shape[2], device=key.device) - torch.arange(query.shape[2], device=key.device)[:, None]
    seen = (ahead >= -(left if left >= 0 else key.shape[2])) & (ahead <= (right if right >= 0 else key.shape[2]))
    own = as_four_axes(mask)
    if own is None:
        return seen[None, None]
    return own & seen if own.dtype == torch.bool else own.masked_fill(~seen, -torch.inf)


def has_exit(processor: object) -> bool:
    """Does the processor's `__call__` itself make one of the two calls by a global name that can be bound anew?"""
    function = type(processor).__call__
    code = getattr(function, "__code__", None)
    if code is None:
        return False
    by_dispatch = DISPATCH in code.co_names and DISPATCH in function.__globals__
    by_sdpa = SDPA in code.co_names and function.__globals__.get("F") is torch.nn.functional
    return by_dispatch or by_sdpa


@functools.cache
def processor_class(base: type, prefix: str) -> type:
    """A subclass of the processor class `base` whose attention calls go to `self.layer` (None: the model's own).

    Named `<prefix><base's name>` and built by `cls()` like its base.
    """
    exit_ = Exit(base.__call__.__globals__, prompts="IPAdapter" in base.__name__)
    inner, refresh = _rebind(base.__call__, exit_)

    @functools.wraps(base.__call__)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            former, exit_.traced = exit_.traced, self.layer
            try:
                return inner(self, *args, **kwargs)
            finally:
                exit_.traced = former
        token = _computed.set(self.layer)
        try:
            return inner(self, *args, **kwargs)
        finally:
            _computed.reset(token)

    attributes = {
        "__call__": call,
        "__copy__": shallow_copy,
        "__deepcopy__": deep_copy,
        "__reduce_ex__": refuse_to_pickle,
        "__module__": base.__module__,
        "layer": None,
        "refresh": staticmethod(refresh),
        "mechanism": property(lambda self: None if self.layer is None else self.layer.mechanism),
    }
    return _PassesForBase(f"{prefix}{base.__name__}", (base,), attributes)


def refuse_other_keys(name: str, queries: int, keys: int, mechanism: object) -> NoReturn:
    """For a call with other keys than the queries' own tokens."""
    raise ValueError(
        f"{name} attends from {queries} queries to {keys} keys, as with a cache of keys or a reference among them: "
        f"{mechanism} takes calls with as many keys as queries alone; leave this layer out by layers=, or call "
        f"diffattn.restore first"
    )


class _PassesForBase(type):
    """Makes a class equal to its base: diffusers looks classes of processors up in lists and tables."""

    def __eq__(cls, other: object) -> bool:
        return other is cls or other is cls.__bases__[0]

    def __hash__(cls) -> int:
        return hash(cls.__bases__[0])


def swapped_processor(processor: Any, prefix: str, layer: Layer) -> Any:
    """A copy of a family's processor whose attention goes to `layer`."""
    base: Any = type(processor)
    own: Any = object.__new__(processor_class(base, prefix))
    own.refresh()  # somebody may have patched the family's module since the class was made
    own.__dict__.update(processor.__dict__)
    own.__dict__.update(layer=layer, original=processor)
    return own


def original_of(processor: Any) -> Any:
    """The family's processor that one of ours was made from; others are their own."""
    found = processor.__dict__.get("original") if is_ours(processor) else None
    return without_swap(processor) if found is None else found


def layer_of(processor: object) -> Any:
    """The layer that a processor of ours belongs to; None for all others."""
    return processor.__dict__.get("layer") if is_ours(processor) else None


def is_ours(processor: object) -> bool:
    """Was it made by `processor_class`?"""
    return isinstance(type(processor), _PassesForBase)


def deep_copy(self: Any, memo: dict[int, Any]) -> Any:
    """A deep copy that does not ask for pickling."""
    new: Any = object.__new__(type(self))
    memo[id(self)] = new
    new.__dict__.update(copy.deepcopy(self.__dict__, memo))
    return new


def shallow_copy(self: Any) -> Any:
    """A copy that does not ask for pickling."""
    new: Any = object.__new__(type(self))
    new.__dict__.update(self.__dict__)
    return new


def refuse_to_pickle(self: Any, protocol: Any) -> Any:
    """Swapped processors and what hangs on them hold classes made at run time and functions of families."""
    raise pickle.PicklingError(
        "a model with swapped attention cannot be pickled: call diffattn.restore first, and diffattn.apply where it is "
        "loaded; diffattn.save writes trained weights, save_pretrained the model"
    )


def _rebind(function: Any, exit_: Exit) -> tuple[Callable[..., Any], Callable[[], None]]:
    """`function` with its attention calls bound to `exit_`, and what gives it the names its module has by then."""
    module = types.ModuleType(f"diffattn._intercepted_{next(_serial)}")
    sys.modules[module.__name__] = module
    ours: dict[str, Any] = {"__name__": module.__name__}
    if DISPATCH in function.__globals__:
        ours[DISPATCH] = exit_.dispatch_attention_fn
    if function.__globals__.get("F") is torch.nn.functional:
        functional = types.ModuleType(torch.nn.functional.__name__)
        functional.__dict__.update(torch.nn.functional.__dict__)
        functional.__dict__[SDPA] = exit_.scaled_dot_product_attention
        ours["F"] = functional

    def bound(own: Any) -> Any:
        new = types.FunctionType(own.__code__, module.__dict__, own.__name__, own.__defaults__, own.__closure__)
        new.__kwdefaults__ = own.__kwdefaults__
        return new

    ours |= {name: bound(helper) for name, helper in attending_helpers(function).items()}

    def refresh() -> None:
        module.__dict__.update({**function.__globals__, **ours})

    refresh()
    return bound(function), refresh


def own_attention(
    settings: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None
) -> Tensor:
    """What the family's processor would compute for (b, h, n, d), by the backend of the swapped one, `settings`."""
    if query.shape[1] != key.shape[1]:
        key, value = repeat_heads(key, value, query.shape[1])
    processor = original_of(settings)
    if DISPATCH not in type(processor).__call__.__code__.co_names:
        return torch.nn.functional.scaled_dot_product_attention(query, key, value, mask, scale=scale)
    from diffusers.models.attention_dispatch import dispatch_attention_fn

    out = dispatch_attention_fn(
        *(tensor.transpose(1, 2) for tensor in (query, key, value)),
        attn_mask=mask,
        scale=scale,
        backend=getattr(settings, "_attention_backend", None),
        parallel_config=getattr(settings, "_parallel_config", None),
    )
    return out.transpose(1, 2)


def without_swap(processor: Any) -> Any:
    """The processor as its family makes it, with what was set on ours since, such as a backend or scales."""
    if not is_ours(processor):
        return processor
    own: Any = object.__new__(type(processor).__bases__[0])
    own.__dict__.update(settings_of(processor))
    return own


def settings_of(processor: Any) -> dict[str, Any]:
    """What a swapped processor's attributes say beside its layer and its original."""
    return {name: value for name, value in processor.__dict__.items() if name not in ("layer", "original")}


def values_replace_attention() -> bool:
    """Is this the perturbed forward of PAG? There diffusers answers every call of softmax attention with its values.

    A mechanism that makes no such call, or calls of other sizes, would attend as ever, and guidance would do nothing.
    """
    modes = torch.overrides._get_current_function_mode_stack()
    return any(type(mode).__name__ == "AttentionScoreSkipFunctionMode" for mode in modes)


def as_four_axes(mask: Tensor | None) -> Tensor | None:
    """A mask over keys (b, m), or over queries and keys (b, n, m), as (b, 1, 1 or n, m)."""
    if mask is None or mask.ndim == 4:
        return mask
    return mask[:, None, None] if mask.ndim == 2 else mask[:, None]


def mask_on_keys(mask: Tensor | None, cells: Sequence[int]) -> Tensor | None:
    """What a mask (b, 1, 1 or n, m) on padding says of the keys: the row of a query that is none, a cell's.

    `cells` has one of the whole batch, or one of each sample. A mask of numbers is added to the scores of every query
    as it is: Chroma's pipelines pass ones and zeros, which weigh the padding less and do not hide it.
    """
    if mask is None or mask.shape[2] == 1 or mask.is_floating_point():
        return mask
    if len(set(cells)) == 1:
        return mask[:, :, cells[0] : cells[0] + 1]
    return torch.stack([mask[i % len(mask), :, cell : cell + 1] for i, cell in enumerate(cells)])
