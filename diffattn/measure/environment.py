"""The machine and what is installed on it, for a report: no names of users, no paths."""

import contextlib
import os
import platform
import re
from importlib.metadata import PackageNotFoundError, requires, version
from typing import Any

import torch

from .hardware import hardware

PACKAGES = (
    *("diffattn", "torch", "diffusers", "transformers", "accelerate", "huggingface_hub", "safetensors", "tokenizers"),
    *("numpy", "pillow", "triton"),
)
NOT_EXTRAS = ("all", "dev")
VARIABLES = re.compile(
    r"(DIFFATTN|DIFFUSERS|TRANSFORMERS|HF_HUB|TORCH|TORCHINDUCTOR|TORCHDYNAMO|PYTORCH|TRITON|NCCL)_\w+"
    r"|(OMP|MKL|OPENBLAS)_NUM_THREADS|CUDA_VISIBLE_DEVICES|RANK|LOCAL_RANK|WORLD_SIZE|CC|CXX"
)
"""Names of environment variables that change what is computed, or how fast."""
SECRET = re.compile(r"TOKEN|KEY|SECRET|PASSWORD")
PLAIN = re.compile(r"[\w.,:+=-]{1,60}")
"""Values that are shown; of others, such as folders, it is told that they are set."""


def environment() -> dict[str, Any]:
    """Releases, extras, processor, devices, threads and environment variables, as JSON has them."""
    machine = hardware()
    return {
        "python": platform.python_version(),
        "system": machine["system"],
        "packages": {name: installed(name) for name in PACKAGES},
        "extras": extras(),
        "cpu": {
            "name": machine["cpu"],
            "cores": machine["cores"],
            "vectors": torch.backends.cpu.get_cpu_capability(),
            "memory_gib": _memory(),
        },
        "devices": devices(),
        "threads": {"compute": torch.get_num_threads(), "interop": torch.get_num_interop_threads()},
        "variables": variables(),
    }


def installed(package: str) -> str | None:
    """The release of a distribution; None where there is none."""
    with contextlib.suppress(PackageNotFoundError):
        return version(package)
    return None


def extras() -> list[dict[str, Any]]:
    """The distributions of the library's extras, with their releases; none where the library is not installed."""
    try:
        lines = requires("diffattn") or []
    except PackageNotFoundError:
        return []
    found = (re.match(r"([\w.-]+).*;\s*extra\s*==\s*['\"]([\w-]+)['\"]", line) for line in lines)
    pairs = sorted({(match[2], match[1]) for match in found if match and match[2] not in NOT_EXTRAS})
    return [{"extra": extra, "package": package, "version": installed(package)} for extra, package in pairs]


def devices() -> list[dict[str, Any]]:
    """The accelerators that this torch sees; `memory_gib` is that of the device, None where it is not told."""
    found = []
    for number in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        properties = torch.cuda.get_device_properties(number)
        capability = f"{properties.major}.{properties.minor}"
        memory = round(properties.total_memory / 2**30, 1)
        found.append(
            {"device": f"cuda:{number}", "name": properties.name, "memory_gib": memory, "capability": capability}
        )
    if torch.backends.mps.is_available():
        found.append({"device": "mps", "name": platform.processor() or "Apple", "memory_gib": None})
    return found


def variables() -> dict[str, str]:
    """The environment variables that are set and count."""
    chosen = {name: value for name, value in sorted(os.environ.items()) if VARIABLES.fullmatch(name)}
    return {
        name: value if PLAIN.fullmatch(value) and not SECRET.search(name) else "(set)" for name, value in chosen.items()
    }


def without_paths(text: str) -> str:
    """A text whose paths are left out."""
    return re.sub(r"[^\s('\"]*[/\\][^\s)'\"]*", "(path)", text)


def _memory() -> float | None:
    """Of the machine, where the system tells it."""
    with contextlib.suppress(ValueError, OSError, AttributeError):
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    return None
