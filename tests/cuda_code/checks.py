"""One check of CUDA code without a GPU: written by Inductor for a pretended card, interpreted, compared with float64.

The tokens are laid out by the library's own functions, as on CUDA but in the CPU's memory; the kernels that would run
on them are those that the library asks torch.compile for.
"""

import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from diffattn.grid import TokenGrid
from diffattn.kernels import flex
from diffattn.kernels.block_mask import block_mask
from diffattn.kernels.call import WindowCall, window_call
from diffattn.kernels.flex import Ordered, Plan
from diffattn.kernels.pattern import Pattern, dense_mask
from diffattn.kernels.routed import flex as routed_flex

from .compiled import Compiled
from .interpreted import load_module
from .pretended import Written, as_cuda, capture, fake_tensors, pretend

CPU = torch.device("cpu")
ERRORS = {torch.float32: 5e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
"""Largest differences to float64 of outputs, and of gradients relative to their largest."""
BACKWARD = {
    "BACKEND": "AUTO",
    "PRESCALE_QK": False,
    "ROWS_GUARANTEED_SAFE": False,
    "BLOCKS_ARE_CONTIGUOUS": False,
    "WRITE_DQ": True,
    "OUTPUT_LOGSUMEXP": True,
    "OUTPUT_MAX": False,
}
"""What `flex_attention` hands its operator where gradients are asked for."""


@dataclass(frozen=True)
class Check:
    """What is computed, and for which card."""

    card: str
    pattern: Any
    """A mechanism; its pattern on the grid is checked."""
    grid: TokenGrid
    dtype: torch.dtype = torch.bfloat16
    heads: int = 1
    kv_heads: int | None = None
    head_dim: int = 64
    batch: int = 1
    pooled: int = 0
    mask: bool = False
    """Does the model hide keys?"""
    backward: bool = False

    def __str__(self) -> str:
        name = f"{self.card} {self.pattern} {self.grid} {str(self.dtype).removeprefix('torch.')} d{self.head_dim}"
        heads = f" heads {self.heads}/{self.kv_heads or self.heads} batch {self.batch}"
        more = f"{' pooled' if self.pooled else ''}{' mask' if self.mask else ''}{' backward' if self.backward else ''}"
        return name + heads + more


@dataclass
class Found:
    """What a check found: the largest difference of the output, relative ones of the gradients."""

    output: float
    gradients: dict[str, float] = field(default_factory=dict)


@contextmanager
def on_cuda(backward: bool = False) -> Iterator[None]:
    """Meanwhile windows are planned as on CUDA."""

    def plan(pattern: Pattern, shape: Any, extra: int, device: torch.device, needs: bool = False) -> Plan:
        return flex.cuda_plan(pattern, shape, extra, CPU, backward)

    with mock.patch.object(flex, "plan", plan):
        yield


def window(check: Check) -> WindowCall:
    """The call of a check, on the CPU."""
    generator = torch.Generator().manual_seed(0)
    grid, d = check.grid, check.head_dim

    def normal(heads: int, tokens: int) -> Tensor:
        return torch.randn(check.batch, heads, tokens, d, generator=generator).to(check.dtype)

    kv_heads = check.kv_heads or check.heads
    q, k, v = (normal(heads, grid.tokens) for heads in (check.heads, kv_heads, kv_heads))
    pooled = (normal(kv_heads, check.pooled), normal(kv_heads, check.pooled)) if check.pooled else None
    mask = torch.rand(check.batch, 1, 1, grid.tokens, generator=generator) > 0.3 if check.mask else None
    return window_call(q, k, v, grid, check.pattern.pattern(grid), d**-0.5, mask, pooled)


def expected(call: WindowCall, leaves: list[Tensor]) -> Tensor:
    """The cells' output by explicit exponentials in float64; `leaves`: q, k, v and the pooled of both."""
    q, k, v, *pooled = leaves
    group = q.shape[1] // k.shape[1]
    keys, values = (torch.cat([x, *more], 2) for x, more in ((k, pooled[:1]), (v, pooled[1:])))
    keys, values = (x.repeat_interleave(group, 1) for x in (keys, values))
    allowed = dense_mask(call.pattern, call.grid, call.pooled_count)
    if call.mask is not None:
        allowed = allowed & torch.nn.functional.pad(call.mask, (0, call.pooled_count), value=True)
    out = torch.softmax((q @ keys.mT * call.scale).masked_fill(~allowed, -math.inf), -1) @ values
    return call.grid.split(out)[0]


def write_forward(card: str, ordered: Ordered, keep_logsumexp: bool = False) -> Written:
    """The module for the forward pass of tokens in tile order."""
    found: list[Written] = []
    torch._dynamo.reset()
    flex._compiled.cache_clear()
    with pretend(card), fake_tensors(), capture(found), torch.set_grad_enabled(keep_logsumexp):
        as_on_cuda(ordered).attend()
    return found[0]


def as_on_cuda(ordered: Ordered) -> Ordered:
    """The same with fake CUDA tensors."""
    blocks = ordered.blocks
    backward = None if blocks.backward is None else as_cuda(blocks.backward)
    faked = type(blocks)(blocks.rule, as_cuda(blocks.lists), backward, blocks.size, blocks.lengths)
    names = ("q", "k", "v", "coordinates", "bias")
    return ordered._replace(blocks=faked, **{name: as_cuda(getattr(ordered, name)) for name in names})


def inputs(ordered: Ordered) -> dict[str, Tensor]:
    """By the names that Dynamo gives the inputs of the graph."""
    found = {"l_q_": ordered.q, "l_k_": ordered.k, "l_v_": ordered.v}
    found |= {f"l_lists_{i}_": tensor for i, tensor in enumerate(ordered.blocks.tensors)}
    found |= {f"l_coordinates_{i}_": tensor for i, tensor in enumerate(ordered.coordinates)}
    return found if ordered.bias is None else found | {"l_bias_": ordered.bias}


def run_forward(written: Written, ordered: Ordered, folder: Path) -> tuple[Tensor, list[Tensor]]:
    """The output in tile order, and the buffers that the module made."""
    made: list[Tensor] = []
    values = inputs(ordered)
    out = load_module(written.source, folder, made)([values[name] for name in written.inputs])[0]
    return out, made


def check_window(check: Check, folder: Path) -> Found:
    """Write, interpret and compare; with gradients where the check asks for them."""
    call = window(check)
    with on_cuda(check.backward):
        ordered = flex.ordered_call(call)
    out, made = run_forward(write_forward(check.card, ordered, check.backward), ordered, folder)
    leaves = [x.double().requires_grad_(check.backward) for x in (call.q, call.k, call.v, *(call.pooled or ()))]
    want = expected(call, leaves)
    found = Found(difference(ordered.order.from_tiles(out), want))
    if check.backward:
        grad = torch.randn(want.shape, generator=torch.Generator().manual_seed(1)).to(check.dtype)
        got = run_backward(check.card, ordered, out, logsumexp(made, ordered), grad, folder)
        found.gradients = compare_gradients(call, ordered, got, want, leaves, grad)
    return found


def difference(got: Tensor, want: Tensor) -> float:
    """The largest; NaN counts as infinite."""
    found = float((got.detach().double() - want.detach()).abs().max())
    return found if math.isfinite(found) else math.inf


def logsumexp(made: list[Tensor], ordered: Ordered) -> Tensor:
    """The buffer of the forward pass that the backward reads."""
    (found,) = [x for x in made if x.shape == ordered.q.shape[:3] and x.dtype == torch.float32][:1]
    return found


def write_backward(card: str, ordered: Ordered) -> Written:
    """The module for the gradients of tokens in tile order, by the operator itself.

    Autograd would ask a fake tensor for its stream, and end the process. Arguments: q, k, v, output, logsumexp, the
    gradient of the output, the lists, the coordinates.
    """
    from torch._higher_order_ops.flex_attention import flex_attention_backward
    from torch._inductor.compile_fx import compile_fx_inner
    from torch._inductor.decomposition import select_decomp_table
    from torch.fx.experimental.proxy_tensor import make_fx

    blocks, lists = ordered.blocks, len(ordered.blocks.tensors)

    def rule(b: Tensor, h: Tensor, m: Tensor, n: Tensor, *tables: Tensor) -> Tensor:
        return blocks.rule.mask_mod(tables)(b, h, m, n)

    def run(*tensors: Tensor) -> Any:
        mask = block_mask(tensors[6 : 6 + lists], rule, blocks.size, blocks.lengths).as_tuple()
        options = BACKWARD | dict(flex.cuda_options(tensors[0], blocks.size))
        return flex_attention_backward(
            *tensors[:6], None, lambda score, *place: score, lambda score, b, h, m, n, g: [g, None, None, None, None],
            mask, ordered.scale, options, (), tensors[6 + lists :],
        )[:3]  # fmt: skip

    found: list[Written] = []
    torch._dynamo.reset()
    with pretend(card), fake_tensors(), capture(found), torch.no_grad():
        q, logsumexp = ordered.q, torch.empty(ordered.q.shape[:3])
        values = [q, ordered.k, ordered.v, q, logsumexp, q, *blocks.tensors, *ordered.coordinates]
        values = [as_cuda(tensor) for tensor in values]
        graph = make_fx(run, decomposition_table=select_decomp_table(), tracing_mode="real")(*values)
        compile_fx_inner(graph, values)
    return found[0]


def run_backward(
    card: str, ordered: Ordered, out: Tensor, logsumexp: Tensor, grad: Tensor, folder: Path
) -> tuple[Tensor, ...]:
    """Gradients of q, k and v in tile order."""
    values = [ordered.q, ordered.k, ordered.v, out, logsumexp, ordered.order.to_tiles(grad)]
    values += [*ordered.blocks.tensors, *ordered.coordinates]
    return tuple(load_module(write_backward(card, ordered).source, folder)(values)[:3])


def compare_gradients(
    call: WindowCall, ordered: Ordered, got: tuple[Tensor, ...], want: Tensor, leaves: list[Tensor], grad: Tensor
) -> dict[str, float]:
    """Relative to the largest of each; keys behind the cells by their own names."""
    want.backward(grad.double())
    order, others, pooled = ordered.order, call.grid.others, call.pooled_count
    found: dict[str, float] = {}
    for i, (name, tensor) in enumerate(zip("qkv", got, strict=True)):
        exact = leaves[i].grad
        assert exact is not None
        cells, rest = call.grid.split(exact)
        parts = {f"d{name}": (order.from_tiles(tensor[:, :, : order.cells]), cells)}
        behind = tensor[:, :, order.cells :]
        if name != "q" and others:
            parts[f"d{name} of text"] = behind[:, :, :others], rest
        if name != "q" and pooled:
            of_pooled = leaves[i + 2].grad
            assert of_pooled is not None
            parts[f"d{name} of pooled"] = behind[:, :, others : others + pooled], of_pooled
        for part, (ours, theirs) in parts.items():
            found[part] = difference(ours, theirs) / float(theirs.abs().max())
    return found


def compiled(card: str, source: str, folder: Path) -> list[Compiled]:
    """The template kernels of a module as machine code, by a process in which Triton compiles."""
    given, found = folder / "sources.json", folder / "results.json"
    given.write_text(json.dumps([{"card": card, "source": source}]))
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(Path(__file__).with_name("compiled.py")), str(given), str(found)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = json.loads(found.read_text())[0]
    return [Compiled(**{**row, "loops": tuple(row["loops"]), "products": tuple(row["products"])}) for row in rows]


def check_routed(card: str, prepared: routed_flex.Prepared, folder: Path) -> Tensor:
    """Output `(g, queries, c)` of the kernel for chosen tiles."""
    found: list[Written] = []
    torch._dynamo.reset()
    routed_flex._compiled.cache_clear()
    with pretend(card), fake_tensors(), capture(found), torch.no_grad():
        routed_flex.Prepared(*as_cuda(tuple(prepared[:-1])), prepared.sizes).attend()
    values = {f"l_{name}_": getattr(prepared, name) for name in ("q", "k", "v", "bias", "seen")}
    values |= {f"l_lists_{name}": value for name, value in prepared.lists._asdict().items()}
    values |= {f"l_lists_{i}_": value for i, value in enumerate(prepared.lists)}
    out: Tensor = load_module(found[0].source, folder)([values[name] for name in found[0].inputs])[0]
    return out[0]
