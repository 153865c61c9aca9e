"""Which classes of diffusers attend, read from their code: whatever the config, and without building a model."""

import inspect
import types
from collections.abc import Iterator

CALLS = {"scaled_dot_product_attention", "dispatch_attention_fn", "flex_attention", "softmax"}
NAMES = ("Attention", "Attn")
SOURCE = "diffusers.models"


def attends(model: type) -> bool:
    """Does the class, or anything of diffusers that its code names, ask for attention or have it in its name?"""
    seen: set[object] = set()
    waiting: list[type | types.FunctionType] = [model]
    while waiting:
        thing = waiting.pop()
        if thing in seen:
            continue
        seen.add(thing)
        if any(name in thing.__name__ for name in NAMES):
            return True
        for function in _functions(thing):
            names = _names(function.__code__)
            if CALLS & names:
                return True
            found = (function.__globals__.get(name) for name in names)
            waiting += [
                value
                for value in found
                if isinstance(value, type | types.FunctionType) and value.__module__.startswith(SOURCE)
            ]
    return False


def _functions(thing: type | types.FunctionType) -> Iterator[types.FunctionType]:
    """A function itself; of a class its methods and properties, and those of its base classes in diffusers' models."""
    if isinstance(thing, types.FunctionType):
        yield thing
        return
    for cls in thing.__mro__:
        # the base of every model looks for attention in whatever it is
        if cls.__module__.startswith(SOURCE) and cls.__module__ != f"{SOURCE}.modeling_utils":
            for value in vars(cls).values():
                function = inspect.unwrap(getattr(value, "fget", getattr(value, "__func__", value)))
                if isinstance(function, types.FunctionType):
                    yield function


def _names(code: types.CodeType) -> set[str]:
    """Every global and attribute that the code names, inner functions included."""
    inner = (constant for constant in code.co_consts if isinstance(constant, types.CodeType))
    return set(code.co_names).union(*(_names(part) for part in inner))
