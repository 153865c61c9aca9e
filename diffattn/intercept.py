"""The exit of one attention processor: the place where a family's own processor asks for softmax(q k^T) v.

Every diffusers processor ends in one of two calls, `dispatch_attention_fn(q, k, v, ...)` in (b, n, h, d) or
`F.scaled_dot_product_attention(q, k, v, ...)` in (b, h, n, d). We run the family's own `__call__`, byte code and all,
with those two names bound to an `Exit`. Projections, norms, rotary embeddings, fused QKV and whatever a later release
adds stay the family's business, and no other model, class or module is touched.

What it takes to make that work, also under `torch.compile(fullgraph=True)`:

- the new function's globals belong to a real module in `sys.modules`, with `__builtins__` and `__package__` copied:
  dynamo looks globals up by module name, and processors import relatively;
- `F` becomes a copy of the module `torch.nn.functional` with one function replaced;
- keyword defaults and closure are copied, and the new `__call__` carries the signature of the old one, because
  diffusers drops every keyword that `inspect.signature(processor.__call__)` does not name;
- the class subclasses the family's own and ends in its name: diffusers tests both;
- processors that diffusers looks up by class get a copy of their base's metadata.
"""

import functools
import itertools
import sys
import types
from collections.abc import Callable
from typing import Any, Protocol

import torch.nn.functional
from torch import Tensor

DISPATCH, SDPA = "dispatch_attention_fn", "scaled_dot_product_attention"

_serial = itertools.count()


class Layer(Protocol):
    """What an exit hands its call to: `diffattn.layer.SwappedLayer`."""

    def wants(self, query: Tensor, key: Tensor, parallel_config: Any = None) -> bool:
        """Does the mechanism compute this call, or the model's own attention? Both tensors are (b, h, n, d)."""
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


class Exit:
    """Stands for the two attention functions inside one rebound `__call__`; `layer` is the layer being computed.

    With `prompts` the processor is an IP-Adapter's: what follows the layer's own attention goes to picture prompts.
    """

    def __init__(self, dispatch: Callable[..., Tensor] | None, prompts: bool = False) -> None:
        self._dispatch = dispatch
        self._prompts = prompts
        # an attribute of the object from the start: torch.compile would compile anew once it appears
        self.layer: Layer | None = None

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
        if self.layer is None or not self.layer.wants(q, k, parallel_config):
            assert self._dispatch is not None
            return self._dispatch(
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
        k, v = repeat_heads(k, v, q.shape[1]) if enable_gqa else (k, v)
        return self._take().attend(q, k, v, attn_mask, scale, parallel_config).transpose(1, 2)

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
        if self.layer is None or not self.layer.wants(query, key):
            return torch.nn.functional.scaled_dot_product_attention(
                query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
            )
        _refuse(dropout_p, is_causal)
        key, value = repeat_heads(key, value, query.shape[1]) if enable_gqa else (key, value)
        return self._take().attend(query, key, value, attn_mask, scale)

    def _take(self) -> Layer:
        """The layer, for one call: further ones, for picture prompts, stay with the model whatever their keys."""
        assert self.layer is not None
        layer = self.layer
        if self._prompts:
            self.layer = None
        return layer


def _refuse(dropout_p: float, is_causal: bool) -> None:
    if dropout_p or is_causal:
        raise NotImplementedError(
            f"swapped attention has neither dropout nor a causal order, but the model asks for "
            f"dropout_p={dropout_p}, is_causal={is_causal}; leave this layer out with layers="
        )


def repeat_heads(key: Tensor, value: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """Grouped-query attention: repeat the heads of (b, g, m, d) keys and values up to `heads`."""
    return key.repeat_interleave(heads // key.shape[1], 1), value.repeat_interleave(heads // value.shape[1], 1)


def has_exit(processor: object) -> bool:
    """Does the processor's `__call__` itself make one of the two calls by a global name that can be bound anew?"""
    function = type(processor).__call__
    code = getattr(function, "__code__", None)
    if code is None:
        return False
    by_dispatch = DISPATCH in code.co_names and DISPATCH in function.__globals__
    by_sdpa = SDPA in code.co_names and function.__globals__.get("F") is torch.nn.functional
    return by_dispatch or by_sdpa


def processor_class(base: type, prefix: str, attributes: dict[str, Any]) -> type:
    """A subclass of the processor class `base` whose attention calls go to `self.layer` (None: the model's own).

    Named `<prefix><base's name>` and built by `cls()` like its base. `release` forgets it.
    """
    exit_ = Exit(base.__call__.__globals__.get(DISPATCH), prompts="IPAdapter" in base.__name__)
    inner, module = _rebind(base.__call__, exit_)

    @functools.wraps(base.__call__)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        former, exit_.layer = exit_.layer, self.layer
        try:
            return inner(self, *args, **kwargs)
        finally:
            exit_.layer = former

    name = f"{prefix}{base.__name__}"
    own = {"__call__": call, "layer": None, "__module__": base.__module__, "__globals_name__": module.__name__}
    cls = type(name, (base,), {**own, **attributes})
    _copy_metadata(base, cls)
    return cls


def _rebind(function: Any, exit_: Exit) -> tuple[Callable[..., Any], types.ModuleType]:
    """`function` with its attention calls bound to `exit_`, and the module that holds its globals."""
    module = types.ModuleType(f"diffattn._intercepted_{next(_serial)}")
    name = module.__name__
    module.__dict__.update(function.__globals__)
    module.__dict__["__name__"] = name
    if DISPATCH in function.__globals__:
        module.__dict__[DISPATCH] = exit_.dispatch_attention_fn
    if function.__globals__.get("F") is torch.nn.functional:
        functional = types.ModuleType(torch.nn.functional.__name__)
        functional.__dict__.update(torch.nn.functional.__dict__)
        functional.__dict__[SDPA] = exit_.scaled_dot_product_attention
        module.__dict__["F"] = functional
    sys.modules[name] = module
    bound = types.FunctionType(
        function.__code__, module.__dict__, function.__name__, function.__defaults__, function.__closure__
    )
    bound.__kwdefaults__ = function.__kwdefaults__
    return bound, module


def without_swap(processor: Any) -> Any:
    """The processor as its family makes it: diffusers builds processors anew by their class, and that may be ours."""
    cls = type(processor)
    if "__globals_name__" not in vars(cls):
        return processor
    own: Any = object.__new__(cls.__bases__[0])
    own.__dict__.update(settings_of(processor))
    return own


def settings_of(processor: Any) -> dict[str, Any]:
    """What a swapped processor's attributes say beside its layer: also what was set since, such as scales."""
    return {name: value for name, value in processor.__dict__.items() if name != "layer"}


def release(cls: type) -> None:
    """Forget a class made by `processor_class`."""
    from diffusers.hooks._helpers import AttentionProcessorRegistry

    AttentionProcessorRegistry._registry.pop(cls, None)
    sys.modules.pop(cls.__globals_name__, None)  # type: ignore[attr-defined]


def _copy_metadata(base: type, cls: type) -> None:
    from diffusers.hooks._helpers import AttentionProcessorRegistry

    try:
        metadata = AttentionProcessorRegistry.get(base)
    except ValueError:
        return
    AttentionProcessorRegistry.register(cls, metadata)
