"""The machine that figures were measured on."""

import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch


def hardware(device: str | torch.device = "cpu") -> dict[str, Any]:
    """What a reader of a timing must know of the machine: processor, threads, versions, load."""
    on_cuda = torch.device(device).type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if on_cuda else _processor(),
        "cpu": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "load_average": [round(load, 2) for load in os.getloadavg()] if hasattr(os, "getloadavg") else None,
    }


def hardware_line(machine: Mapping[str, Any]) -> str:
    """`hardware()` in one line."""
    load = machine["load_average"]
    busy = "" if load is None else f", load average {load[0]:.1f}"
    return f"{machine['device']}, {machine['threads']} of {machine['cores']} threads, torch {machine['torch']}{busy}"


def _processor() -> str:
    """The processor's own name where the system tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
