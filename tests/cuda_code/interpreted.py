"""Modules that Inductor wrote for CUDA, run on CPU tensors: their kernels by Triton's interpreter.

The interpreter of Triton 3.7 and 3.8 computes with the bit patterns of bfloat16 where it should with numbers, and cuts
where it should round. `mend` lets it go through torch's numbers. It says nothing of races, shared memory, or speed.

Import before anything that decorates with `triton.jit`, with TRITON_INTERPRET=1 in the environment.
"""

import contextlib
import importlib.util
import inspect
import re
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime import interpreter

STORED = {tl.bfloat16: (torch.bfloat16, torch.uint16)}
"""Numbers that NumPy lacks: torch's type, and the whole numbers in which the interpreter stores their bits."""
PLAIN = {tl.float16: torch.float16, tl.float32: torch.float32, tl.float64: torch.float64}

_convert = interpreter._convert_float
_builder = type(interpreter.interpreter_builder)
_binary = _builder.binary_op


def _numbers(data: Any, kind: Any) -> Tensor:
    tensor = torch.from_numpy(np.ascontiguousarray(data))
    return tensor.view(STORED[kind][0]) if kind in STORED else tensor


def _bits(values: Tensor, kind: Any) -> Any:
    if kind in STORED:
        return values.to(STORED[kind][0]).contiguous().view(STORED[kind][1]).numpy()
    return values.to(PLAIN[kind]).numpy()


def _convert_float(data: Any, before: Any, after: Any, rounding: Any) -> Any:
    """To the nearest, even among equals."""
    known = STORED.keys() | PLAIN.keys()
    if before not in known or after not in known:
        return _convert(data, before, after, rounding)
    out = _bits(_numbers(np.asarray(data), before).float(), after)
    return out.view(getattr(np, f"uint{after.primitive_bitwidth}")).reshape(np.shape(data))


def _wide(handle: Any) -> Any:
    kind = handle.dtype.scalar
    return _numbers(handle.data, kind).float().numpy() if kind in STORED else handle.data


def _dot(self: Any, a: Any, b: Any, d: Any, precision: Any, imprecise: Any) -> Any:
    return interpreter.TensorHandle(np.matmul(_wide(a), _wide(b), dtype=d.data.dtype) + d.data, d.dtype.scalar)


def _binary_op(self: Any, left: Any, right: Any, op: Callable[[Any, Any], Any]) -> Any:
    kind = left.dtype.scalar
    if kind not in STORED:
        return _binary(self, left, right, op)
    out = op(_wide(left), _wide(right))
    if out.dtype == np.bool_:
        return interpreter.TensorHandle(out, tl.int1)
    return interpreter.TensorHandle(_bits(torch.from_numpy(np.ascontiguousarray(out)), kind), kind)


def mend() -> None:
    """Let the interpreter compute with bfloat16."""
    interpreter._convert_float = _convert_float
    _builder.create_dot = _dot
    _builder.binary_op = _binary_op


class Libdevice:
    """What Inductor's code takes from libdevice; looked up when called, since the interpreter replaces them."""

    floor = staticmethod(lambda x: tl.floor(x))
    rsqrt = staticmethod(lambda x: tl.rsqrt(x))
    sqrt = staticmethod(lambda x: tl.sqrt(x))
    abs = staticmethod(lambda x: tl.abs(x))
    signbit = staticmethod(lambda x: x < 0)
    isnan = staticmethod(lambda x: x != x)
    isinf = staticmethod(lambda x: tl.abs(x) == float("inf"))


class Launcher:
    """`run` of a kernel as the generated module calls it."""

    def __init__(self, kernel: Any, template: bool) -> None:
        self.kernel, self.template = kernel, template

    def run(self, *args: Any, stream: Any = None, **options: Any) -> None:
        if self.template:
            *values, x, y, z = args
            self.kernel[(x, y, z)](*values)
            return
        names = getattr(self.kernel, "arg_names", None) or list(inspect.signature(self.kernel.fn).parameters)
        blocks = {name: size for name, size in (("XBLOCK", 64), ("YBLOCK", 1), ("R0_BLOCK", 64)) if name in names}
        sizes = dict(zip(names, args, strict=False))
        grid = (-(-sizes["xnumel"] // blocks["XBLOCK"]), -(-sizes.get("ynumel", 1) // blocks.get("YBLOCK", 1)))
        self.kernel[grid](*args, **blocks)


def load_kernel(name: str, source: str, folder: Path) -> Launcher:
    """An interpreted kernel from its text; `triton.jit` wants it in a file."""
    kind = re.search(r"@triton_heuristics\.(\w+)\(", source)
    assert kind is not None, source[:200]
    start, end = source.index("@triton_heuristics"), source.index("@triton.jit")
    text = source[:start] + source[end:]
    ours = f"from {__name__} import Libdevice as libdevice, Libdevice as tl_math"
    text = re.sub(r"^from torch\._inductor\.runtime.*libdevice.*$", ours, text, flags=re.M)
    path = folder / f"{name}.py"
    path.write_text(text.replace("triton_helpers.set_driver_to_gpu()", ""))
    spec = importlib.util.spec_from_file_location(f"{folder.name}_{name}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return Launcher(getattr(module, name), kind[1] == "template")


REPLACED = (
    (r"async_compile = AsyncCompile\(\)", ""),
    (
        r"empty_strided_cuda = torch\._C\._dynamo\.guards\._empty_strided_cuda",
        "def empty_strided_cuda(size, stride, dtype): return made(torch.empty_strided(size, stride, dtype=dtype))",
    ),
    (r"^from torch\._C import _cuda_getCurrentRawStream as get_raw_stream$", "get_raw_stream = lambda index: 0"),
    (r"torch\.cuda\._DeviceGuard\(\d\)", "contextlib.nullcontext()"),
    (r"torch\.cuda\.set_device\(\d\)", "pass"),
    (r"^empty_strided_(xpu|mtia|p2p).*$|^assert_alignment.*$", ""),
    (r"^from torch\._C\._dynamo\.guards import copy_if_misaligned$", "copy_if_misaligned = lambda tensor: tensor"),
)


def load_module(source: str, folder: Path, made: list[Tensor] | None = None) -> Callable[[list[Tensor]], Any]:
    """`call` of a written module; the buffers that it makes are appended to `made`."""
    for pattern, text in REPLACED:
        source = re.sub(pattern, text, source, flags=re.M)

    def note(tensor: Tensor) -> Tensor:
        if made is not None:
            made.append(tensor)
        return tensor

    compiler = types.SimpleNamespace(
        triton=lambda name, text, **options: load_kernel(name, text, folder), wait=lambda scope: None
    )
    scope: dict[str, Any] = {"made": note, "async_compile": compiler, "contextlib": contextlib, "__name__": "written"}
    exec(compile(source, "written", "exec"), scope)
    call: Callable[[list[Tensor]], Any] = scope["call"]
    return call


def interprets() -> bool:
    """Was Triton imported to be interpreted?"""
    return bool(triton.knobs.runtime.interpret)


mend()
