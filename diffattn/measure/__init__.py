"""Measure: latency, memory, fidelity, cost, and the machine they were measured on."""

from .cost import attention_share
from .fidelity import psnr, ssim
from .hardware import hardware, hardware_line
from .latency import Timing, latency, synchronize
from .memory import PeakMemory, peak_memory

__all__ = [
    "PeakMemory",
    "Timing",
    "attention_share",
    "hardware",
    "hardware_line",
    "latency",
    "peak_memory",
    "psnr",
    "ssim",
    "synchronize",
]
