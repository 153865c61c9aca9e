"""Which kernel computes a window: what each can do, as data, and the choice of "auto".

A backend is one file with one function on a `WindowCall` and one row in `BACKENDS`. A backend never changes the result.
"""

import json
import logging
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor

from .blocks import block_keys
from .call import WindowCall, reordered
from .cuda import size_refused
from .dense import dense_attention
from .flex import MOST_CELLS, flex_window_attention, has_avx512, missing_compiler, takes_order
from .natten import has_library, natten_attention, natten_refuses
from .pattern import covers
from .tiled import best_windows, tiled_attention
from .xformers import xformers_attention, xformers_refuses

logger = logging.getLogger("diffattn")


@dataclass(frozen=True)
class Backend:
    """What a kernel is and can do. `None` in a set's place: no restriction."""

    name: str
    run: Callable[[WindowCall], Tensor]
    """Computes a call that `refuses` has nothing against."""
    devices: frozenset[str] | None = None
    dtypes: frozenset[torch.dtype] | None = None
    gradients: frozenset[str] | None = None
    """Devices on which it has a backward pass."""
    query_masks: bool = False
    """Whether the model's mask may differ from query to query."""
    mask_gradients: bool = False
    """Whether it has gradients for an additive mask."""
    compiled: bool = False
    """Whether it needs torch.compile, hence a compiler."""
    any_pattern: bool = True
    """Whether it serves every pattern."""
    grouped_heads: bool = False
    """Whether several heads of queries may share one of keys; else keys and values are copied for it."""
    objects: Callable[[WindowCall], str | None] | None = None
    """What else it has against a call: something not installed, a pattern or a size it does not know."""

    def compute(self, call: WindowCall) -> Tensor:
        """The output `(b, h, n, c)`."""
        call = call if self.grouped_heads else call.with_all_heads()
        if call.order is None or (self.name == "flex" and takes_order(call)):
            return self.run(call)
        return reordered(self.run(call.in_rows()), call.grid, call.order.to_tiles)

    def refuses(self, call: WindowCall) -> str | None:
        """Why this backend can't serve `call`; None where it can."""
        device = call.q.device.type
        if self.devices is not None and device not in self.devices:
            return f"it runs on {', '.join(sorted(self.devices))}, and the tensors are on {device}"
        if self.dtypes is not None and call.q.dtype not in self.dtypes:
            return f"it has no kernel for {call.q.dtype}"
        if self.gradients is not None and call.needs_grad and device not in self.gradients:
            return f"it has no backward pass on {device}"
        if call.masks_queries and not self.query_masks:
            return "the model's mask differs from query to query"
        if call.mask is not None and call.mask.requires_grad and torch.is_grad_enabled() and not self.mask_gradients:
            return "the model's mask needs a gradient"
        objection = self.objects(call) if self.objects is not None else None
        if objection is not None or not self.compiled:
            return objection
        if torch.compiler.is_compiling():
            return "an outer torch.compile is tracing, and its blocks must be laid out before"
        return missing_compiler(call.q.device)


def flex_refuses(call: WindowCall) -> str | None:
    """What FlexAttention has against the size of a grid or of the heads."""
    if call.grid.cells > MOST_CELLS:
        return f"its compiled rule counts up to {MOST_CELLS} cells, and the grid has {call.grid.cells}"
    return size_refused(call.q, call.v) if call.q.device.type == "cuda" else None


BACKENDS = MappingProxyType(
    {
        backend.name: backend
        for backend in (
            Backend("dense", dense_attention, query_masks=True, mask_gradients=True),
            Backend("tiled", tiled_attention),
            Backend(
                "flex",
                flex_window_attention,
                devices=frozenset({"cpu", "cuda"}),
                dtypes=frozenset({torch.float32, torch.float16, torch.bfloat16}),
                gradients=frozenset({"cuda"}),
                compiled=True,
                grouped_heads=True,
                objects=flex_refuses,
            ),
            Backend(
                "natten",
                natten_attention,
                devices=frozenset({"cpu", "cuda"}),
                dtypes=frozenset({torch.float32, torch.float16, torch.bfloat16}),
                gradients=frozenset({"cuda"}),
                any_pattern=False,
                objects=natten_refuses,
            ),
            Backend(
                "xformers",
                xformers_attention,
                devices=frozenset({"cuda"}),
                dtypes=frozenset({torch.float32, torch.float16, torch.bfloat16}),
                objects=xformers_refuses,
            ),
        )
    }
)


GENERAL_BACKENDS = tuple(name for name, backend in BACKENDS.items() if backend.any_pattern)
"""Those that serve every pattern."""


@dataclass(frozen=True)
class Choice:
    """The backend that will run, and why."""

    backend: str
    reason: str


# Measured on 2 busy CPU cores, 4 heads x 64, float32, no text, medians of 9 interleaved rounds, in ms:
#   cells      radius   dense   tiled   flex     tokens / keys of a tile
#   32 x 32    8          24      88     40      1.1
#   48 x 48    8          69     147     52      2.6
#   64 x 64    16        228     278    113      1.9
#   64 x 64    8         384     222     76      4.6
#   128 x 128  8           -     594    272     18
TILED_SAVING = 4
"""Times that tiles must shorten the keys of a query to pay."""
BLOCKS_SAVING = 1.5
"""The same for whole tiles, which have no mask: 1.7 times fewer keys take 0.8 of the dense time at 40 x 40."""
DENSE_MOST = 4096
"""Cells beyond which `auto` never builds the dense mask for its speed."""
THRESHOLDS = Path(__file__).with_name("thresholds.json")


@dataclass(frozen=True)
class Thresholds:
    """From which size on `auto` takes which kernel, on one kind of device."""

    dense_cells: int
    """Up to this many cells it computes the mask densely."""
    flex_cells: int
    """From this many on it spends the seconds of a compilation, where the kernel is faster than tiles."""
    source: str
    """How these were found."""


def load_thresholds(own: str | None) -> dict[str, Thresholds]:
    """Those of `thresholds.json` for each kind of device, and in their place those of the file `own`."""
    found = json.loads(THRESHOLDS.read_text())
    if own is not None:
        try:
            found |= json.loads(Path(own).read_text())
            return {device: Thresholds(**row) for device, row in found.items()}
        except (OSError, ValueError, TypeError) as error:
            raise ValueError(f"DIFFATTN_THRESHOLDS must name a JSON file that gpu_check.py wrote: {error}") from None
    return {device: Thresholds(**row) for device, row in found.items()}


LIMITS = MappingProxyType(load_thresholds(os.environ.get("DIFFATTN_THRESHOLDS")))
"""By kind of device; others are taken for CPUs."""


# On 2 cores with AVX2 alone, 128 x 128 tokens, medians of 5 interleaved rounds, in ms; 16 x 32 x 32 tokens are even.
#   clear radius 8   flex 147, tiled 120      neighborhood 13   flex 160, tiled 112
#   clear radius 16  flex 382, tiled 328      halo radius 16    flex 101, tiled 115 (whole tiles: no mask)


def beats_tiles(call: WindowCall) -> bool:
    """Whether the compiled kernel is faster than tiles: masks are cheap with AVX-512, and whole tiles have none."""
    return call.q.device.type != "cpu" or has_avx512() or block_keys(call.pattern, call.grid) is not None


def natten_has_kernel(call: WindowCall) -> bool:
    """Whether NATTEN serves `call` with a kernel of its own, not by an uncompiled FlexAttention."""
    if torch.compiler.is_compiling() or call.q.device.type != "cuda" or not has_library():
        return False
    return BACKENDS["natten"].refuses(call) is None


def takes_natten(call: WindowCall, backend: str) -> bool:
    """Whether `backend`, which may be "auto", hands `call` to NATTEN."""
    if backend == "auto" and natten_has_kernel(call):
        return choose(call).backend == "natten"
    return backend == "natten"


def choose(call: WindowCall) -> Choice:
    """What "auto" runs `call` with."""
    tiled = BACKENDS["tiled"].refuses(call)
    if tiled is not None:
        return Choice("dense", f"tiles can't serve it: {tiled}")
    limits = LIMITS.get(call.q.device.type, LIMITS["cpu"])
    if call.grid.cells <= limits.dense_cells:
        return Choice("dense", f"the pattern saves nothing on {call.grid.cells} cells, {limits.source}")
    if torch.compiler.is_compiling():
        return Choice("tiled", "an outer torch.compile traces plain operations")
    if call.pooled is None and covers(call.pattern, call.grid):
        return Choice("dense", "the window covers the grid")
    if natten_has_kernel(call):
        return Choice("natten", "NATTEN has a kernel for this pattern")
    flex = BACKENDS["flex"].refuses(call)
    if flex is None and call.grid.cells >= limits.flex_cells and beats_tiles(call):
        return Choice("flex", f"fewest keys per query, from {limits.flex_cells} cells on, {limits.source}")
    if flex is not None:
        reason = f"flex can't serve it: {flex}"
    elif call.grid.cells < limits.flex_cells:
        reason = f"{call.grid.cells} cells do not repay a compilation, {limits.source}"
    else:
        reason = "without AVX-512 tiles are faster than flex"
    keys, saving = block_keys(call.pattern, call.grid), BLOCKS_SAVING
    if keys is None:
        keys, saving = math.prod(best_windows(call.pattern, call.grid).window), TILED_SAVING
    keys += call.extra_keys
    if call.grid.cells <= DENSE_MOST and call.grid.tokens + call.pooled_count < saving * keys:
        return Choice("dense", f"{reason}, and tiles save too little: {keys} keys a query of {call.grid.tokens}")
    return Choice("tiled", reason)


def run(call: WindowCall, backend: str) -> Tensor:
    """Compute `call` with `backend`, or with what `choose` says for "auto"."""
    if backend == "auto":
        choice = choose(call)
        if not torch.compiler.is_compiling():
            _announce(call, choice)
        return BACKENDS[choice.backend].compute(call)
    if backend not in BACKENDS:
        raise ValueError(f"unknown backend {backend!r}; known: auto, {', '.join(BACKENDS)}")
    reason = BACKENDS[backend].refuses(call)
    if reason is not None:
        others = [name for name, other in BACKENDS.items() if other.refuses(call) is None]
        raise ValueError(f"backend={backend!r} can't serve this call: {reason}; can: auto, {', '.join(others)}")
    return BACKENDS[backend].compute(call)


_announced: set[tuple[object, ...]] = set()


def _announce(call: WindowCall, choice: Choice) -> None:
    """One log line for each distinct pattern, grid, dtype, device and choice."""
    key = (call.pattern, call.grid, call.q.dtype, call.q.device, choice)
    if key not in _announced:
        _announced.add(key)
        logger.info(
            "%s on %s tokens, %s, %s: backend %s (%s)",
            call.pattern,
            call.grid,
            str(call.q.dtype).removeprefix("torch."),
            call.q.device,
            choice.backend,
            choice.reason,
        )
