"""Model how long a long video takes on several GPUs: work and bytes are counted, speeds assumed, nothing is timed.

    seconds = steps * (flops / (peak * utilisation) + bytes / bandwidth + latency * calls)

    flops   of a rank's forward with guidance: VideoCrafter2's UNet on the meta device, frames / ranks frames
    bytes   that an inner rank receives in it: (4 P + 2 ceil(K / W) (W - 1)) e S + 2 e C + 8 (W - 1) G
    calls   exchanges in it: two for each attention along the frames, one for each convolution and GroupNorm

with P frames of window on either side, K global frames, W ranks, e bytes a number, S numbers a frame in the keys of all
attentions along the frames, C in the inputs of all convolutions along them, G groups of all GroupNorms over them.
"""

import math
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

import torch
import typer
from diffusers import UNet3DConditionModel
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from diffattn.mechanisms import DualScopeAttention
from diffattn.parallel import FramePlan, apply_on_clips

GPU, PEAK, UTILISATION = "H100", 989e12, 0.4
"""Dense bf16 FLOP/s, and the share of them that a model gets."""
ELEMENT = 2
"""Bytes of a number in bf16."""
HEIGHT, WIDTH, VAE_FACTOR, TEXT_TOKENS, GUIDED = 320, 512, 8, 77, 2
WINDOW = DualScopeAttention(padding=8, top_k=16, local_phase=None, global_phase=None)
"""The released example's. Phases change biases, not work."""


@dataclass(frozen=True)
class Link:
    """What a rank reaches the others by; every rank has one of its own."""

    name: str
    bandwidth: float
    """Bytes a second in one direction."""
    latency: float
    """Seconds of one exchange, beside its bytes."""


LINKS = (
    Link("NVLink, 450 GB/s", 450e9, 20e-6),
    Link("PCIe, 25 GB/s", 25e9, 30e-6),
    Link("100 Gb/s Ethernet, 12.5 GB/s", 12.5e9, 60e-6),
)


@dataclass(frozen=True)
class Work:
    """What a forward computes, and the sizes that decide what ranks exchange."""

    flops: int
    keys: int
    """S"""
    inputs: int
    """C"""
    groups: int
    """G, those of all samples"""
    calls: int

    def received(self, ranks: int) -> int:
        """Bytes that an inner rank of `ranks` receives in a forward; of two ranks, each has one neighbour."""
        sides, share = min(2, ranks - 1), math.ceil(WINDOW.top_k / ranks)
        frames = 2 * WINDOW.padding * sides + 2 * share * (ranks - 1)
        return ELEMENT * (frames * self.keys + sides * self.inputs) + 8 * (ranks - 1) * self.groups


def measure(unet: nn.Module, frames: int, height: int, width: int) -> Work:
    """Count a forward of `unet`, on the meta device, with latents of `frames` x `height` x `width`, as one rank alone.

    Not counted: frames of a halo that convolutions compute twice, two of a clip's.
    """
    config: Any = unet.config
    sizes = {"keys": 0, "inputs": 0, "groups": 0, "calls": 0}
    hooks = [
        module.register_forward_pre_hook(_counter(name, module, frames, sizes)) for name, module in unet.named_modules()
    ]
    sample = torch.empty(GUIDED, config.in_channels, frames, height, width, device="meta")
    text = torch.empty(GUIDED, TEXT_TOKENS, config.cross_attention_dim, device="meta")
    try:
        plan, counter = FramePlan((frames,)), FlopCounterMode(display=False)
        with torch.no_grad(), apply_on_clips(unet, plan, WINDOW), counter:
            unet(sample, torch.empty((), device="meta"), text)
    finally:
        for hook in hooks:
            hook.remove()
    return Work(counter.get_total_flops(), **sizes)


def _counter(name: str, module: nn.Module, frames: int, sizes: dict[str, int]) -> Callable[..., None]:
    """A hook that adds what `module` would exchange to `sizes`."""
    along = "temp_attentions" in name or "transformer_in" in name

    def count(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        if name.endswith("to_k") and along:
            sizes["keys"] += args[0].numel() // args[0].shape[-1] * module.weight.shape[0] // frames
            sizes["calls"] += 2
        elif isinstance(module, nn.Conv3d):
            sizes["inputs"] += args[0].numel() // frames
            sizes["calls"] += 1
        elif isinstance(module, nn.GroupNorm) and args[0].dim() == 5:
            sizes["groups"] += args[0].shape[0] * module.num_groups
            sizes["calls"] += 1

    return count


def table(work: Work, clip: int, frames: int, ranks: int, steps: int) -> str:
    """The model in Markdown; `work` is that of a forward with `clip` frames, the longest of the clips."""
    per_frame = work.flops / clip
    alone = steps * per_frame * frames / (PEAK * UTILISATION)
    rows = [("1 GPU", alone, 0.0)]
    for link in LINKS:
        seconds = steps * (work.received(ranks) / link.bandwidth + link.latency * work.calls)
        rows.append((f"{ranks} GPUs, {link.name}", steps * work.flops / (PEAK * UTILISATION), seconds))
    latencies = ", ".join(f"{1e6 * link.latency:.0f}" for link in LINKS)
    about = (
        f"This is a model, not a measurement. Counted: {per_frame / 1e12:.3f} TFLOP per frame and step, with guidance; "
        f"{work.received(ranks) / 1e9:.2f} GB received by an inner rank in a step of {work.calls} exchanges. "
        f"Assumed: {GPU}, {PEAK / 1e12:.0f} TFLOP/s in bf16 at {UTILISATION:.0%} utilization; one link per GPU; "
        f"{latencies} µs per exchange for the links in this order; {steps} steps of {WIDTH} x {HEIGHT} pixels, "
        f"padding {WINDOW.padding}, top_k {WINDOW.top_k}; no overlap of communication and computation; unlimited "
        "memory. Text encoder and VAE are not included."
    )
    head = ("computation, s", "communication, s", "sum, s", "speedup")
    lines = [f"| modelled time: {frames:,} frames on {ranks} GPUs | {' | '.join(head)} |", "|---|---|---|---|---|"]
    for name, computing, talking in rows:
        both = computing + talking
        lines.append(f"| {name} | {computing:.1f} | {talking:.1f} | {both:.1f} | {alone / both:.2f} |")
    return "\n".join([*lines, "", textwrap.fill(about, 120)])


app = typer.Typer(add_completion=False)


@app.command(epilog="Example: python scripts/long_video_model.py --frames 480 --gpus 4")
def main(
    frames: Annotated[int, typer.Option(min=1, help="Of the whole video.")] = 2300,
    gpus: Annotated[int, typer.Option(min=2, help="Ranks that share them.")] = 8,
    steps: Annotated[int, typer.Option(min=1, help="Denoising steps.")] = 30,
) -> None:
    """Print the modelled time of a long video as a Markdown table, from counted work and assumed speeds."""
    if frames < gpus:
        raise typer.BadParameter(f"expected a frame for each of {gpus} GPUs; got {frames}; give fewer --gpus")
    clip = math.ceil(frames / gpus)
    with torch.device("meta"):
        unet = UNet3DConditionModel()  # the defaults are ModelScope's, and VideoCrafter2's size
    work = measure(unet, clip, HEIGHT // VAE_FACTOR, WIDTH // VAE_FACTOR)
    typer.echo(table(work, clip, frames, gpus, steps))


if __name__ == "__main__":
    app()
