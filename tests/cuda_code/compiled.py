"""Kernels that Inductor wrote, compiled to machine code for a GPU that is not there: registers, spills, instructions.

    python tests/cuda_code/compiled.py SOURCES.json RESULTS.json

SOURCES: a list of {"card": ..., "source": ...}, a source being a whole written module; RESULTS: for each the list of
its template kernels, as `Compiled`. Runs without TRITON_INTERPRET, hence in a process of its own.
"""

import ast
import importlib.util
import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

if __package__:
    from .cards import CARDS
else:
    sys.path.insert(0, str(Path(__file__).parent))
    from cards import CARDS


class Compiled(NamedTuple):
    """What a kernel takes."""

    registers: int
    """Of a thread; 255 are the most."""
    spilled: int
    """Bytes of a thread that did not fit into them."""
    shared: int
    """Bytes of shared memory of a block of threads."""
    loops: tuple[int, ...]
    """Instructions of a warp in one step of each innermost loop with tensor products, in the order of the code."""
    products: tuple[str, ...]
    """Kinds of tensor instructions."""


def templates(source: str) -> dict[str, str]:
    """Text of the kernels that come from templates, not of pointwise ones, by name."""
    found = re.findall(r"async_compile\.triton\('(\w+)', '''(.*?)''', device_str", source, re.S)
    return {name: text for name, text in found if "@triton_heuristics.template" in text}


def compile_kernel(card: str, name: str, text: str, folder: Path) -> Compiled:
    """Compile one kernel and read its machine code."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    start, end = text.index("@triton_heuristics"), text.index("@triton.jit")
    head = text[start:end]
    signature = ast.literal_eval(_found(r"'signature': (\{.*?\})", head))
    options = {kind: int(_found(rf"{kind}=(\d+)", head)) for kind in ("num_stages", "num_warps")}
    path = folder / f"{name}.py"
    path.write_text(text[:start] + text[end:])
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(signature.values()) if kind.startswith("*")}
    major, minor = CARDS[card].capability
    built: Any = triton.compile(
        ASTSource(getattr(module, name), signature, {}, aligned),
        target=GPUTarget("cuda", major * 10 + minor, 32),
        options=options,
    )
    (folder / "kernel.cubin").write_bytes(built.asm["cubin"])
    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    usage = _run(tools / "cuobjdump", "--dump-resource-usage", folder / "kernel.cubin")
    lines = _run(tools / "nvdisasm", "-c", folder / "kernel.cubin")
    loops = inner_loops(lines)
    names = {part for loop in loops for part in loop if "MMA" in part}
    counted = tuple(sum(loop.values()) for loop in loops)
    registers, stack = (int(_found(rf"{kind}:(\d+)", usage)) for kind in ("REG", "STACK"))
    return Compiled(registers, stack, int(built.metadata.shared), counted, tuple(sorted(names)))


def inner_loops(machine_code: str) -> list[Counter[str]]:
    """Instructions by kind from a label to a branch back to it, where there are tensor products and no inner loop."""
    lines: list[tuple[str, str]] = []
    labels: dict[str, int] = {}
    for line in machine_code.splitlines():
        if label := re.match(r"^(\.L_\w+):", line.strip()):
            labels[label[1]] = len(lines)
        if found := re.match(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P[T0-9]+ +)?([A-Z][A-Z0-9_.]*)(.*?);", line):
            lines.append((found[1], found[2]))
    spans = []
    for i, (name, rest) in enumerate(lines):
        target = re.search(r"\.L_\w+", rest) if name.startswith("BRA") else None
        if target and labels.get(target[0], len(lines)) <= i:
            spans.append((labels[target[0]], i))
    spans = [span for span in spans if any("MMA" in name for name, _ in lines[span[0] : span[1]])]
    inner = [s for s in spans if not any(o != s and s[0] <= o[0] and o[1] <= s[1] for o in spans)]
    return [Counter(name.split(".")[0] for name, _ in lines[first : last + 1]) for first, last in inner]


def _found(pattern: str, text: str) -> str:
    found = re.search(pattern, text, re.S)
    assert found is not None, f"{pattern} is not in {text[:300]}"
    return found[1]


def _run(*command: Any) -> str:
    return subprocess.run([str(part) for part in command], check=True, capture_output=True, text=True).stdout


def main(sources: Path, results: Path) -> None:
    """One result, or the error that it ended with, for each source."""
    found: list[Any] = []
    for entry in json.loads(sources.read_text()):
        rows = []
        for name, text in templates(entry["source"]).items():
            with tempfile.TemporaryDirectory() as folder:
                rows.append(compile_kernel(entry["card"], name, text, Path(folder))._asdict())
        found.append(rows)
        results.write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
