"""The commands that measure, count and compare."""

from . import bench, calibrate, compare, estimate, mask, summary

__all__ = ["bench", "calibrate", "compare", "estimate", "mask", "summary"]
