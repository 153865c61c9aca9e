"""What only a GPU can tell, in one run of 8 minutes: are the kernels right, how fast, how large, from which size on.

    python scripts/gpu_check.py                       on the first CUDA device
    python scripts/gpu_check.py --seconds 240         stops cleanly with what it has by then
    python scripts/gpu_check.py --cpu                 a small size without a GPU, to see that the script runs

It needs torch (with Triton) and the checkout, no other package; what needs diffusers is left out without it. The parts
run in the order below, each is complete before the next, and everything is in --output after every line: check.json to
send, check.md to read. thresholds.json has the sizes from which `auto` takes which kernel, as measured: give its path
in DIFFATTN_THRESHOLDS. Times are CUDA events in interleaved rounds: milliseconds, median (minimum-maximum).
"""

import argparse
import contextlib
import importlib.util
import json
import os
import statistics
import sys
import time
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

ROOT = Path(__file__).resolve().parents[1]
Row = dict[str, Any]


def without_diffusers() -> None:
    """Where diffusers is missing, make the package importable all the same: its kernels need torch alone."""
    sys.path.insert(0, str(ROOT))
    if importlib.util.find_spec("diffusers") is None:
        package = types.ModuleType("diffattn")
        package.__path__ = [str(ROOT / "diffattn")]
        sys.modules["diffattn"] = package


without_diffusers()
from diffattn.grid import TokenGrid  # noqa: E402
from diffattn.mechanisms.agent import AgentAttention  # noqa: E402
from diffattn.mechanisms.base import Mechanism  # noqa: E402
from diffattn.mechanisms.clear import ClearAttention  # noqa: E402
from diffattn.mechanisms.halo import HaloAttention  # noqa: E402
from diffattn.mechanisms.linear import LinearAttention  # noqa: E402
from diffattn.mechanisms.neighborhood import NeighborhoodAttention  # noqa: E402
from diffattn.mechanisms.patterns import (  # noqa: E402
    MultiAxisAttention,
    PerHeadAttention,
    ShiftedWindowAttention,
)
from diffattn.mechanisms.routing import RoutingAttention  # noqa: E402

SMALL = {
    "clear": ClearAttention(radius=6),
    "clear, pool": ClearAttention(radius=4, pool=(8, 16)),
    "halo": HaloAttention(tile=(8, 16), halo=1),
    "halo, tile 8": HaloAttention(tile=8, halo=1),
    "neighborhood": NeighborhoodAttention(kernel_size=7),
    "neighborhood, dilated, causal": NeighborhoodAttention(kernel_size=5, dilation=(3, 2), is_causal=(False, True)),
    "routing": RoutingAttention(top_k=3, tile=(8, 16), pool=4),
    "routing, tile 8": RoutingAttention(top_k=4, tile=8, pool=4),
    "routing, order=content": RoutingAttention(top_k=3, tile=(8, 16), pool=4, order="content"),
    "multi_axis": MultiAxisAttention(window=8),
    "multi_axis, pool": MultiAxisAttention(window=8, pool=4),
    "shifted_window": ShiftedWindowAttention(window=(8, 16)),
    "per_head": PerHeadAttention(mechanisms=(HaloAttention(tile=8, halo=0), ClearAttention(radius=6)), heads=(0, 1, 1)),
    "routing, order=centroids, means=weighted": RoutingAttention(
        top_k=3, tile=(8, 16), pool=4, order="centroids", means="weighted"
    ),
    "agent": AgentAttention(num_agents=64),
    "linear": LinearAttention(),
}
LARGE = {
    "clear, radius 8": ClearAttention(radius=8),
    "clear, radius 16": ClearAttention(radius=16),
    "halo, tile 8, halo 1": HaloAttention(tile=8, halo=1),
    "halo, tile (8, 16), halo 1": HaloAttention(tile=(8, 16), halo=1),
    "neighborhood, kernel 13": NeighborhoodAttention(kernel_size=13),
    "clear, radius 8, pool 16": ClearAttention(radius=8, pool=16),
    "routing, 4 of tile (8, 16), pool 8": RoutingAttention(top_k=4, tile=(8, 16), pool=8),
    "routing, 4 of tile 16, pool 8": RoutingAttention(top_k=4, tile=16, pool=8),
    "agent, 256 agents": AgentAttention(num_agents=256),
    "linear": LinearAttention(),
}


COMPILED_ON_CPU = ("clear", "routing")
PAIR = "flex", "dense"
GAIN = 1.2
"""Times that FlexAttention must be faster than the dense mask, for `auto` to spend the seconds of its compilation."""


class OutOfTimeError(Exception):
    """The limit is reached."""


@dataclass
class Check:
    """One run: where, how long, and what was found."""

    device: torch.device
    seconds: float
    folder: Path
    found: dict[str, list[Row]] = field(default_factory=dict)
    start: float = field(default_factory=time.monotonic)
    part: str = ""

    @property
    def cpu(self) -> bool:
        return self.device.type == "cpu"

    def add(self, **row: Any) -> None:
        """Note a line, write both files, and stop where time is out."""
        self.found.setdefault(self.part, []).append(row)
        self.write()
        print(f"{self.part}: " + ", ".join(f"{name} {value}" for name, value in row.items()), flush=True)
        self.go_on()

    def go_on(self) -> None:
        if time.monotonic() - self.start > self.seconds:
            raise OutOfTimeError

    def write(self, finished: bool = False) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        content = {"machine": machine(self.device), "finished": finished, "parts": self.found}
        texts = {"check.json": json.dumps(content, indent=1), "check.md": markdown(content)}
        for name, text in texts.items():
            (self.folder / f".{name}").write_text(text + "\n")
            os.replace(self.folder / f".{name}", self.folder / name)


def machine(device: torch.device) -> Row:
    """What figures depend on."""
    found: Row = {"torch": torch.__version__, "python": sys.version.split()[0], "device": "cpu"}
    with contextlib.suppress(ImportError):
        import triton

        found["triton"] = triton.__version__
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "device": properties.name,
            "capability": list(torch.cuda.get_device_capability(device)),
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "processors": properties.multi_processor_count,
            "cuda": torch.version.cuda,
        }
    return found


def markdown(content: Row) -> str:
    """One table for each part."""
    lines = [", ".join(f"{name} {value}" for name, value in content["machine"].items())]
    lines += [] if content["finished"] else ["", "Not finished: stopped, or still running."]
    for part, rows in content["parts"].items():
        names = list(dict.fromkeys(name for row in rows for name in row))
        lines += ["", f"## {part}", "", "| " + " | ".join(names) + " |", "|---" * len(names) + "|"]
        lines += ["| " + " | ".join(str(row.get(name, "")) for name in names) + " |" for row in rows]
    return "\n".join(lines)


def inputs(check: Check, grid: TokenGrid, heads: int, head_dim: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Queries, keys and values of one sample."""
    generator = torch.Generator(check.device).manual_seed(0)
    shape = 3, 1, heads, grid.tokens, head_dim
    return tuple(torch.randn(shape, generator=generator, device=check.device).to(dtype))


@contextlib.contextmanager
def noted(check: Check, **row: Any) -> Iterator[Row]:
    """A row to fill; what fails becomes a line of it, and the run goes on."""
    try:
        yield row
    except OutOfTimeError:
        raise
    except Exception as error:
        kind = "refused" if isinstance(error, ValueError) else "FAILED"
        row[kind] = f"{type(error).__name__}: {str(error).splitlines()[0][:160]}" if str(error) else repr(error)
    if check.device.type == "cuda":
        torch.cuda.empty_cache()
    check.add(**row)


def forward_is_right(check: Check) -> None:
    """bfloat16 forward of each mechanism and backend against its reference in float64; a few at other head dims."""
    grid = TokenGrid(16, 24, before=13) if check.cpu else TokenGrid(40, 56, before=77, after=3)
    for name, mechanism in SMALL.items():
        for backend in backends(check, name, mechanism):
            compare(check, name, mechanism, backend, grid, 16 if check.cpu else 64, torch.bfloat16, backward=False)
    for head_dim in () if check.cpu else (128, 72, 160):
        for name in COMPILED_ON_CPU:
            compare(check, name, SMALL[name], "auto", grid, head_dim, torch.bfloat16, backward=False)


def backends(check: Check, name: str, mechanism: Mechanism) -> list[str]:
    """Those to try: on a CPU without the seconds that most compilations take."""
    few = check.cpu and name not in COMPILED_ON_CPU
    return [backend for backend in mechanism.backends if not (few and backend == "flex")]


def other_dtypes_and_gradients(check: Check) -> None:
    """float16, float32 and the backward pass at one small size."""
    grid = TokenGrid(16, 24, before=13) if check.cpu else TokenGrid(24, 40, before=77)
    for dtype in (torch.float16, torch.float32, torch.bfloat16):
        for name, mechanism in SMALL.items():
            compare(check, name, mechanism, "auto", grid, 16 if check.cpu else 64, dtype, backward=True)


def compare(
    check: Check,
    name: str,
    mechanism: Mechanism,
    backend: str,
    grid: TokenGrid,
    head_dim: int,
    dtype: torch.dtype,
    backward: bool,
) -> None:
    """One line: largest difference to float64, with the same choice of tiles, and relative ones of gradients."""
    said = {"mechanism": name, "backend": backend, "head_dim": head_dim, "dtype": str(dtype).removeprefix("torch.")}
    with noted(check, **said) as row:
        low = [tensor.requires_grad_(backward) for tensor in inputs(check, grid, 2, head_dim, dtype)]
        high = [tensor.detach().double().requires_grad_(backward) for tensor in low]
        out = mechanism.attend(*low, grid, backend=backend)
        given = {}
        if isinstance(mechanism, RoutingAttention):
            given["chosen"] = mechanism.choose(*(x.detach() for x in low), grid)
        want = mechanism.reference(*high, grid, **given)
        row["error"] = f"{float((out.detach().double() - want.detach()).abs().max()):.1e}"
        if backward:
            weight = torch.randn_like(want)
            got = torch.autograd.grad((out.double() * weight).sum(), low)
            exact = torch.autograd.grad((want * weight).sum(), high)
            errors = [float((a.double() - b).abs().max() / b.abs().max()) for a, b in zip(got, exact, strict=True)]
            row["gradients"] = f"{max(errors):.1e}"


def latency(check: Check) -> None:
    """Forward of each mechanism and backend beside SDPA, interleaved, on growing images and on a video."""
    if check.cpu:
        cases = [(TokenGrid(16, 16, before=8), 2, 16)]
    else:
        cases = [(TokenGrid(side, side, before=512), 24, 128) for side in (64, 128, 256, 512)]
        cases.insert(2, (TokenGrid(45, 80, frames=21), 12, 128))
    for grid, heads, head_dim in cases:
        dtype = torch.float32 if check.cpu else torch.bfloat16
        q, k, v = inputs(check, grid, heads, head_dim, dtype)
        functions = contestants(check, q, k, v, grid)
        ready = {name: function for name, function in functions.items() if first_call(check, grid, name, function)}
        times = interleaved(check, ready, rounds=3 if grid.tokens > 100_000 else 9)
        full = min((statistics.median(times[name]) for name in times if name.startswith("sdpa")), default=None)
        for name, found in times.items():
            middle = statistics.median(found)
            over = "" if full is None else f"{full / middle:.2f}x"
            check.add(tokens=str(grid), what=name, ms=spread(found), over_full=over)


def contestants(check: Check, q: Tensor, k: Tensor, v: Tensor, grid: TokenGrid) -> dict[str, Callable[[], Tensor]]:
    """SDPA by each of its kernels, and every mechanism by every backend that is not dense."""
    kernels = {"sdpa": None} if check.cpu else {
        "sdpa flash": SDPBackend.FLASH_ATTENTION, "sdpa cudnn": SDPBackend.CUDNN_ATTENTION,
    }  # fmt: skip

    def full(kernel: SDPBackend | None) -> Tensor:
        with contextlib.nullcontext() if kernel is None else sdpa_kernel(kernel):
            return scaled_dot_product_attention(q, k, v)

    functions: dict[str, Callable[[], Tensor]] = {name: partial(full, kernel) for name, kernel in kernels.items()}
    for name, mechanism in LARGE.items():
        for backend in backends(check, name, mechanism):
            if backend != "dense" and (backend != "auto" or len(mechanism.backends) == 1):
                functions[f"{name}, {backend}"] = partial(mechanism.attend, q, k, v, grid, backend=backend)
    return functions


@torch.no_grad()
def first_call(check: Check, grid: TokenGrid, name: str, function: Callable[[], Tensor]) -> bool:
    """Does it run? Notes the seconds of its first call, compilation included, and its peak of memory."""
    part, check.part = check.part, "first calls and memory"
    with noted(check, tokens=str(grid), what=name) as row:
        if not check.cpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        start = time.perf_counter()
        function()
        if not check.cpu:
            torch.cuda.synchronize()
            row["peak_mib"] = round((torch.cuda.max_memory_allocated() - before) / 2**20)
        row["seconds"] = round(time.perf_counter() - start, 2)
    check.part = part
    return "seconds" in row


@torch.no_grad()
def interleaved(check: Check, functions: dict[str, Callable[[], Tensor]], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of every function in every round, after a round that does not count."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for number in range(rounds + 1):
        for name, function in functions.items():
            found = milliseconds(check, function)
            if number:
                times[name].append(found)
        if number > 1:
            check.go_on()
    return times


def milliseconds(check: Check, function: Callable[[], Any]) -> float:
    """By CUDA events; on a CPU by the clock."""
    if check.cpu:
        start = time.perf_counter()
        function()
        return (time.perf_counter() - start) * 1e3
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    function()
    end.record()
    torch.cuda.synchronize()
    return float(begin.elapsed_time(end))


def spread(found: list[float]) -> str:
    return f"{statistics.median(found):.3f} ({min(found):.3f}-{max(found):.3f})"


def thresholds(check: Check) -> None:
    """The size from which each kernel pays: what `auto` reads from thresholds.json, which is written here."""
    sides = (8, 16) if check.cpu else (16, 24, 32, 40, 48, 64, 96)
    heads, head_dim = (2, 16) if check.cpu else (24, 128)
    dtype = torch.float32 if check.cpu else torch.bfloat16
    window = ClearAttention(radius=4)
    kernels: dict[str, tuple[Mechanism, str]] = {
        name: (window, name) for name in ("dense", "tiled", "flex") if not (check.cpu and name == "flex")
    }
    kernels["routing, gather"] = RoutingAttention(top_k=2, tile=8, pool=8), "gather"
    for side in sides:
        grid = TokenGrid(side, side, before=64)
        q, k, v = inputs(check, grid, heads, head_dim, dtype)
        full = partial(scaled_dot_product_attention, q, k, v)
        for name, (mechanism, backend) in kernels.items():
            with noted(check, cells=grid.cells, kernel=name) as row:
                own = partial(mechanism.attend, q, k, v, grid, backend=backend)
                times = interleaved(check, {"full": full, "own": own}, rounds=5)
                row["over_full"] = round(statistics.median(times["full"]) / statistics.median(times["own"]), 3)
    found = flex_pays_from(check.found[check.part])
    if found is not None:
        name = machine(check.device)["device"]
        limits = {"dense_cells": found - 1, "flex_cells": found, "source": f"measured on {name}"}
        text = json.dumps({check.device.type: limits}, indent=1) + "\n"
        (check.folder / ".thresholds.json").write_text(text)
        os.replace(check.folder / ".thresholds.json", check.folder / "thresholds.json")


def flex_pays_from(rows: list[Row]) -> int | None:
    """Cells from which on FlexAttention is `GAIN` times faster than the dense mask, there and at all larger sizes."""
    speeds = {name: {row["cells"]: row.get("over_full") for row in rows if row["kernel"] == name} for name in PAIR}
    flex, dense = (speeds[name] for name in PAIR)
    found = None
    for cells in sorted(flex, reverse=True):
        if flex[cells] is None or flex[cells] < GAIN * (dense.get(cells) or 0):
            break
        found = cells
    return found


def graphs(check: Check) -> None:
    """`torch.compile(mode="reduce-overhead")` around a mechanism: the numbers and times of CUDA graphs."""
    grid = TokenGrid(16, 16, before=8) if check.cpu else TokenGrid(64, 64, before=512)
    q, k, v = inputs(check, grid, 2 if check.cpu else 24, 16 if check.cpu else 128, torch.float32)
    for name, mechanism in (("clear", ClearAttention(radius=8)), ("routing", RoutingAttention(top_k=2, tile=8))):
        with noted(check, mechanism=name) as row, torch.no_grad():
            plain = partial(mechanism.attend, q, k, v, grid)
            options = {"backend": "eager"} if check.cpu else {"mode": "reduce-overhead"}
            graph = torch.compile(plain, **options)
            row["error"] = f"{float((graph() - plain()).abs().max()):.1e}"
            times = interleaved(check, {"plain": plain, "graph": graph}, rounds=5)
            row |= {f"{kind}_ms": spread(found) for kind, found in times.items()}


def a_model(check: Check) -> None:
    """The bundled Flux, where diffusers is installed: full attention, tokens ordered once, and in every layer."""
    if importlib.util.find_spec("diffusers") is None:
        return
    import diffusers

    import diffattn
    from diffattn.swap.apply import swaps_of

    pipe = diffusers.FluxPipeline.from_pretrained(
        diffattn.tiny.path("flux"), torch_dtype=torch.float32 if check.cpu else torch.bfloat16
    ).to(check.device)
    pipe.set_progress_bar_config(disable=True)
    side = 64 if check.cpu else 1024

    def image() -> Tensor:
        generator = torch.Generator().manual_seed(0)
        options = {"height": side, "width": side, "num_inference_steps": 2, "output_type": "latent"}
        found: Tensor = pipe("a red circle on blue", generator=generator, **options).images
        return found

    def each_layer() -> Tensor:
        (swap,) = swaps_of(pipe)
        assert swap.ordering is not None
        swap.ordering.remove()
        return image()

    backend = "tiled" if check.cpu else "flex"
    results: dict[str, Tensor] = {}
    for name in ("full attention", "clear, ordered once", "clear, ordered in every layer"):
        with noted(check, what=name, image=f"{side} x {side}") as row, contextlib.ExitStack() as stack:
            if name != "full attention":
                stack.enter_context(diffattn.apply(pipe, ClearAttention(radius=8), backend=backend))
            run = each_layer if name.endswith("layer") else image
            results[name] = run()
            row["ms"] = spread([milliseconds(check, image) for _ in range(3)])
            if name.endswith("layer"):
                row["error"] = f"{float((results[name] - results['clear, ordered once']).abs().max()):.1e}"


PARTS: dict[str, Callable[[Check], None]] = {
    "bfloat16 forward against float64": forward_is_right,
    "latency": latency,
    "from which size on": thresholds,
    "other dtypes and gradients": other_dtypes_and_gradients,
    "CUDA graphs": graphs,
    "a model": a_model,
}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=480, help="stop with what there is after so many")
    parser.add_argument("--cpu", action="store_true", help="a small size on the CPU")
    parser.add_argument("--output", type=Path, default=Path("outputs/gpu"), help="folder for check.json and check.md")
    given = parser.parse_args(arguments)
    if not given.cpu and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device; --cpu tries the script without one")
    check = Check(torch.device("cpu" if given.cpu else "cuda"), given.seconds, given.output)
    try:
        for check.part, run in PARTS.items():
            run(check)
        check.write(finished=True)
    except OutOfTimeError:
        print(f"stopped after {given.seconds:.0f} s; {given.output / 'check.json'} has what there is")
    failed = [row for rows in check.found.values() for row in rows if "FAILED" in row]
    print(f"{sum(map(len, check.found.values()))} lines, {len(failed)} failed; send {given.output / 'check.json'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
