"""Distillation of a diffusion transformer to an efficient attention; in a checkout it lies in the root's `distill/`."""

from pathlib import Path

_root = Path(__file__).resolve().parents[2]
if (_root / "pyproject.toml").is_file() and (_root / "distill").is_dir():
    __path__.append(str(_root / "distill"))
