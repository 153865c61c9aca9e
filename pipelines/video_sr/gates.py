"""What the LIEMs of given weights do, measured on a random clip.

    y = norm(g x) = (x - mean) / sqrt(var + eps / g^2)          g: the gate of the token, eps = 1e-5

The norm takes most of a gate out again: it acts on a token only where g^2 var(x) is not far above eps. With random
weights of deviation 0.1, leaving all gates out changes the velocity by 1e-4 of its norm; of deviation 1, by a quarter.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .liem import LIEMSpatial, LIEMTemporal

TEXT_TOKENS = 77


@dataclass(frozen=True)
class GateRow:
    """The gates of one LIEM, over all tokens of the clip."""

    network: str
    """`unet` or `controlnet`."""
    module: str
    """Its dotted name in the network."""
    low: float
    mean: float
    high: float
    acting: float
    """Share of the tokens with g^2 var(x) <= eps, where the gate takes at least 30 % off."""


@dataclass(frozen=True)
class GateReport:
    """All gates, and what they do together."""

    rows: tuple[GateRow, ...]
    change: float
    """|v - v'| / |v|, Euclidean norms of the velocity with the gates and without all of them."""


@torch.no_grad()
def measure_gates(
    unet: Any,
    controlnet: Any,
    *,
    timestep: int = 500,
    frames: int = 4,
    height: int = 26,
    width: int = 32,
    seed: int = 0,
) -> GateReport:
    """Range of every gate, and the change of the velocity when all are replaced by 1.

    Latents, low-resolution latents and text are standard normal.

    Args:
        unet: `STARUNet3DConditionModel`.
        controlnet: its `STARControlNetModel`.
        timestep: one for all frames.
        frames: of the clip.
        height: of the latents, 2 more than a multiple of 8.
        width: of the latents, a multiple of 8.
        seed: of what is random.

    Raises `ValueError` for networks without LIEMs and for another size.
    """
    networks = {"unet": unet, "controlnet": controlnet}
    for name, network in networks.items():
        if not _liems(network):
            raise ValueError(f"expected LIEMs in the {name}; got none; its configuration should say liem=True")
    inputs = _draw(unet, (1, unet.config.in_channels, frames, height, width), seed)
    rows: dict[tuple[str, str], GateRow] = {}
    with _evaluating(unet, controlnet):
        with _measuring(networks, rows):
            gated = _velocity(unet, controlnet, timestep, *inputs)
        with _without_gates(unet, controlnet):
            plain = _velocity(unet, controlnet, timestep, *inputs)
    change = torch.linalg.vector_norm(gated - plain) / torch.linalg.vector_norm(gated)
    ordered = (rows[name, module] for name, network in networks.items() for module in _liems(network))
    return GateReport(tuple(ordered), float(change))


def _draw(unet: Any, latents: tuple[int, ...], seed: int) -> list[Tensor]:
    """x_t, the hint and the text."""
    generator = torch.Generator().manual_seed(seed)
    sizes = (latents, latents, (1, TEXT_TOKENS, unet.config.cross_attention_dim))
    return [torch.randn(size, generator=generator).to(unet.device, unet.dtype) for size in sizes]


def _velocity(unet: Any, controlnet: Any, timestep: int, x: Tensor, hint: Tensor, text: Tensor) -> Tensor:
    down, mid = controlnet(x, timestep, text, hint, return_dict=False)
    residuals = {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}
    velocity: Tensor = unet(x, timestep, text, **residuals, return_dict=False)[0]
    return velocity.float()


def _liems(network: nn.Module) -> dict[str, tuple[nn.Module, float]]:
    """Each LIEM by its name, and the eps of the norm behind it."""
    found: dict[str, tuple[nn.Module, float]] = {}
    for name, module in network.named_modules():
        if isinstance(module, LIEMSpatial | LIEMTemporal):
            norm: Any = network.get_submodule(name.replace("local", "norm"))
            found[name] = (module, norm.eps)
    return found


@contextlib.contextmanager
def _measuring(networks: dict[str, Any], rows: dict[tuple[str, str], GateRow]) -> Iterator[None]:
    """Each forward of a LIEM fills its row."""
    with contextlib.ExitStack() as hooks:
        for name, network in networks.items():
            for module, (local, eps) in _liems(network).items():
                hooks.callback(local.register_forward_hook(_measure(rows, name, module, eps)).remove)
        yield


def _measure(rows: dict[tuple[str, str], GateRow], network: str, name: str, eps: float) -> Any:
    """A forward hook that fills a row."""

    def hook(local: Any, args: tuple[Tensor], output: Tensor) -> None:
        gate, dim = local.gate(args[0]).float(), 1 if isinstance(local, LIEMSpatial) else -1
        acting = gate**2 * args[0].float().var(dim, correction=0, keepdim=True) <= eps
        values = (gate.min(), gate.mean(), gate.max(), acting.float().mean())
        rows[network, name] = GateRow(network, name, *(float(value) for value in values))

    return hook


@contextlib.contextmanager
def _without_gates(*networks: nn.Module) -> Iterator[None]:
    """LIEMs give back what they get."""
    with contextlib.ExitStack() as hooks:
        for network in networks:
            for local, _ in _liems(network).values():
                hooks.callback(local.register_forward_hook(lambda local, args, output: args[0]).remove)
        yield


@contextlib.contextmanager
def _evaluating(*networks: nn.Module) -> Iterator[None]:
    """Without dropout."""
    trained = [network for network in networks if network.training]
    for network in trained:
        network.eval()
    try:
        yield
    finally:
        for network in trained:
            network.train()
