"""What a run needs of memory and of the disk, before anything is computed.

    device = weights + max(encode, window, decode)                        all parts there at once
    device = max(text, vae + encode, unet + controlnet + window, vae + decode)      with offload

`encode`, `window` and `decode` are the most bytes of activations that live at a time in one call of the VAE's encoder,
of the networks and of the VAE's decoder. They are measured: the call is made with tensors that have a shape and no
numbers, and what is alive after each operation is summed up. Attention counts as a fused kernel, without its weights'
matrix. Not in it: what kernels need inside, which `MARGIN` is for, and an allocator's fragments. On a CPU that was
measured to be 1.0 to 1.2 times what is counted in float32, and up to 1.9 times in bfloat16.
"""

import shutil
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from diffattn.kernels.dense import free_bytes

from ..i2vgenxl.settings import CELL, UpscaleSettings
from ..i2vgenxl.sizes import Plan
from .opening import WEIGHTED, count_weights, untrained

MARGIN = 1.2
"""Activations with what kernels need inside, over those that are counted."""
COPIES = 5
"""Of a chunk's decoded frames, float32 on the CPU: as decoded, scaled, weighted, held over, coloured."""
STORED = 5
"""Latents of the clip on the disk at most: the hint, and the state and x0 before and after a step."""
VIDEO_BYTES = 0.2
"""Of the result's file for a pixel, at most: five times what noisy film takes."""
TOKENS = 77


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of what operations make, until nothing refers to it any more; views count once."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        """Most at a time."""
        self._now = 0
        self._known: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        """The operation itself."""
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._add(leaf.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = id(storage)
        if key not in self._known:
            self._known[key] = storage.nbytes()
            self._now += storage.nbytes()
            self.peak = max(self.peak, self._now)
            weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self._now -= self._known.pop(key)


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """Bytes."""

    weights: Mapping[str, int]
    """Of each part."""
    encode: int
    """Activations of one call of the VAE's encoder."""
    window: int
    """The same of both networks on one window, or a tile of it."""
    decode: int
    """The same of the VAE's decoder on one chunk, or a tile of it."""
    frames: int
    """Decoded frames on the CPU."""
    disk: int
    """In the work folder."""
    dtype: torch.dtype
    """Of the parts."""
    offload: bool = False

    @property
    def device(self) -> int:
        """What the device needs that computes."""
        most = max(self.encode, self.window, self.decode)
        if not self.offload:
            return sum(self.weights.values()) + most
        networks = self.weights["unet"] + self.weights["controlnet"] + self.window
        vae = self.weights["vae"] + max(self.encode, self.decode)
        return max(self.weights["text_encoder"], networks, vae)

    def on_cpu(self, device: torch.device) -> int:
        """What the CPU's memory needs when `device` computes; weights pass through it."""
        return (self.device if device.type == "cpu" else sum(self.weights.values())) + self.frames

    def describe(self, device: torch.device, folder: Path) -> str:
        """One line."""
        need = self.on_cpu(device) if device.type == "cpu" else self.device
        weights = sum(self.weights.values())
        return (
            f"needs about {_gb(need)} of memory at these settings (weights {_gb(weights)}, window {_gb(self.window)}, "
            f"decode {_gb(self.decode)}{', one at a time' if self.offload else ''}) and {_gb(self.disk)} of disk in "
            f"{folder}"
        )

    def check(self, device: torch.device, folder: Path, kept: int = 0) -> None:
        """Raise `ValueError` where there is less.

        Args:
            device: that computes.
            folder: that the disk is to hold; it need not be there.
            kept: bytes that it has already.
        """
        needs = {device: self.device, torch.device("cpu"): self.on_cpu(device)}
        for place, need in needs.items():
            free = free_bytes(place)
            if free is not None and need > free:
                raise ValueError(
                    f"expected {_gb(need)} of free memory on {place}; got {_gb(free)}; try {self._helps(device)}, or "
                    "--force"
                )
        free = shutil.disk_usage(folder.parent).free
        if self.disk - kept > free:
            raise ValueError(
                f"expected {_gb(self.disk - kept)} of free disk for {folder}; got {_gb(free)}; free some, name an "
                "--output elsewhere, use fewer --frames or a smaller --scale, or --force"
            )

    def _helps(self, device: torch.device) -> str:
        """Options that make the largest part smaller, and the weights."""
        most = max(self.encode, self.window, self.decode)
        helps = ["a smaller --tile or --window"] if most == self.window else ["a smaller --scale"]
        if most == self.decode:
            helps = ["a smaller --decode-chunk or --decode-tile"]
        if self.dtype.itemsize > 2:
            helps.append("--dtype bfloat16")
        if device.type != "cpu" and not self.offload:
            helps.append("--offload")
        return ", ".join(helps)


def plan_memory(
    checkpoint: Path, plan: Plan, settings: UpscaleSettings, dtype: torch.dtype, *, offload: bool = False
) -> MemoryPlan:
    """Work out what a run needs; nothing of its size is made, and no weights are read.

    Args:
        checkpoint: folder from `convert`.
        plan: of the clip.
        settings: the same as for the plan.
        dtype: of all parts.
        offload: one part after the other is on the device.

    Raises `ValueError` for parts of the checkpoint that are missing.
    """
    weights = {name: count_weights(checkpoint, name) * dtype.itemsize for name in WEIGHTED}
    decoded = max(window.end - window.begin for window in plan.decode_windows)
    rows, columns = plan.latent
    pixels, numbers = rows * columns * CELL**2, 4 * plan.frames * rows * columns
    return MemoryPlan(
        weights=weights,
        encode=_activations(lambda: _encode(checkpoint, plan, settings, dtype)),
        window=_activations(lambda: _denoise(checkpoint, plan, settings, dtype)),
        decode=_activations(lambda: _decode(checkpoint, plan, decoded, dtype)),
        frames=COPIES * decoded * pixels * 3 * 4,
        disk=round(4 * STORED * numbers + VIDEO_BYTES * plan.frames * plan.target[0] * plan.target[1]),
        dtype=dtype,
        offload=offload,
    )


def _activations(prepare: Callable[[], Callable[[], Any]]) -> int:
    """Most bytes that are alive in the call that `prepare` gives; both see tensors without numbers."""
    before = torch.get_default_dtype()
    try:
        with FakeTensorMode(), torch.no_grad():
            call = prepare()
            with LiveBytes() as live:
                call()
    finally:
        torch.set_default_dtype(before)
    return round(MARGIN * live.peak)


def _encode(checkpoint: Path, plan: Plan, settings: UpscaleSettings, dtype: torch.dtype) -> Callable[[], Any]:
    """A call of the VAE's encoder."""
    torch.set_default_dtype(dtype)
    vae = untrained(checkpoint, "vae")
    if dtype == torch.float16 and vae.config.force_upcast:
        return _encode(checkpoint, plan, settings, torch.float32)
    rows, columns = (CELL * cells for cells in plan.latent)
    pictures = torch.empty(min(settings.encode_chunk, plan.frames), 3, rows, columns)
    return lambda: vae.encode(pictures).latent_dist.mean


def _denoise(checkpoint: Path, plan: Plan, settings: UpscaleSettings, dtype: torch.dtype) -> Callable[[], Any]:
    """A call of the control branch and the U-Net, on one window and tile."""
    torch.set_default_dtype(dtype)
    unet, controlnet = untrained(checkpoint, "unet"), untrained(checkpoint, "controlnet")
    frames, batch = (
        max(window.end - window.begin for window in plan.windows),
        2 if settings.guidance_batch and settings.guidance_scale != 1 else 1,
    )
    tile = plan.tiles[0]
    x = torch.empty(batch, unet.config.in_channels, frames, tile.height, tile.width)
    text = torch.empty(batch, TOKENS, unet.config.cross_attention_dim)

    def call() -> Any:
        down, mid = controlnet(x, 500, text, x, return_dict=False)
        residuals = {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}
        return unet(x, 500, text, **residuals, return_dict=False)[0]

    return call


def _decode(checkpoint: Path, plan: Plan, frames: int, dtype: torch.dtype) -> Callable[[], Any]:
    """A call of the VAE's decoder, on one chunk and tile."""
    torch.set_default_dtype(dtype)
    vae, tile = untrained(checkpoint, "vae"), plan.decode_tiles[0]
    latents = torch.empty(frames, vae.config.latent_channels, tile.height, tile.width)
    return lambda: vae.decode(latents, num_frames=frames, return_dict=False)[0].float()


def _gb(size: float) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"
