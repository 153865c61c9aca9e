"""The signature of a stock model's `__init__` for a subclass: diffusers reads from it which settings a config holds."""

import inspect
from collections.abc import Callable
from typing import Any

Init = Callable[..., None]


def extends(stock: type, **added: Any) -> Callable[[Init], Init]:
    """Decorate an `__init__(self, *args, **kwargs)`: it shows `stock`'s arguments, and `added` with their defaults."""

    def decorate(init: Init) -> Init:
        signature = inspect.signature(stock.__init__)  # type: ignore[misc]
        keyword = inspect.Parameter.KEYWORD_ONLY
        more = [inspect.Parameter(name, keyword, default=default) for name, default in added.items()]
        init.__signature__ = signature.replace(parameters=[*signature.parameters.values(), *more])  # type: ignore[attr-defined]
        return init

    return decorate
