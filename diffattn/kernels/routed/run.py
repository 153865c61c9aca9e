"""Which kernel computes exact tiles and means, and the choice of "auto". A kernel never changes the result."""

from torch import Tensor

from . import flex, gather
from .call import RoutedCall

BACKENDS = ("auto", "gather", "flex", "dense")


def choose(call: RoutedCall) -> tuple[str, str]:
    """What "auto" runs, and why."""
    if call.q.device.type == "cpu":
        return "gather", "on CPUs no slower than flex, and nothing to compile"
    reason = flex.flex_refuses(call)
    if reason is not None:
        return "gather", f"flex can't serve it: {reason}"
    return "flex", "one kernel for all that is chosen"


def run(call: RoutedCall, backend: str, chosen: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Output `(g, query tiles, cells, c)` by a kernel, which may be "auto", and the exact tiles.

    `chosen` `(g, query tiles, tiles)`: those that are exact, where the call does not say them. Raises `ValueError`
    where the backend that is named cannot serve the call.
    """
    if backend == "auto":
        backend = choose(call)[0]
    if backend != "flex":
        return gather.route(call, chosen)
    reason = flex.flex_refuses(call)
    if reason is not None:
        raise ValueError(f"backend='flex' can't serve this call: {reason}; can: auto, gather, dense")
    return flex.route_flex(call, chosen)


def explain(call: RoutedCall, backend: str) -> str:
    """The kernel that `run` takes, for readers."""
    return ": ".join(choose(call)) if backend == "auto" else backend
