"""Functions beside a processor that ask for attention in its place."""

import types
from typing import Any

DISPATCH, SDPA = "dispatch_attention_fn", "scaled_dot_product_attention"


def attending_helpers(function: Any) -> dict[str, types.FunctionType]:
    """Global functions of its module that `function` calls, directly or through others, and that ask for attention.

    Those between are among them.
    """
    calls, waiting = {}, [function]
    while waiting:
        caller = waiting.pop()
        for name, helper in _helpers(caller):
            if name not in calls:
                calls[name] = helper
                waiting.append(helper)
    found = {name for name, helper in calls.items() if {DISPATCH, SDPA} & _names(helper.__code__)}
    grown = True
    while grown:
        more = {name for name, helper in calls.items() if found & _names(helper.__code__)} - found
        found, grown = found | more, bool(more)
    return {name: calls[name] for name in sorted(found)}


def _helpers(function: Any) -> list[tuple[str, types.FunctionType]]:
    """Global functions of the module of `function` that it names."""
    if not isinstance(function, types.FunctionType):
        return []
    found = ((name, function.__globals__.get(name)) for name in sorted(_names(function.__code__)))
    return [
        (name, value)
        for name, value in found
        if isinstance(value, types.FunctionType) and value.__globals__ is function.__globals__
    ]


def _names(code: types.CodeType) -> set[str]:
    """Every global and attribute that the code names, inner functions included."""
    names = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            names |= _names(constant)
    return names
