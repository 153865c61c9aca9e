"""Measure: latency, memory, fidelity, cost, and the machine they were measured on."""

from .cost import attention_share
from .fidelity import flicker, psnr, psnr_of_frames, ssim
from .hardware import hardware, hardware_line
from .latency import Timing, latency, synchronize
from .memory import PeakMemory, peak_memory

__all__ = [
    "PeakMemory",
    "Timing",
    "attention_share",
    "flicker",
    "hardware",
    "hardware_line",
    "latency",
    "peak_memory",
    "psnr",
    "psnr_of_frames",
    "ssim",
    "synchronize",
]
