"""What PASD costs, and what the cached condition and local windows save: FLOPs of full size, and a measured tiny run.

python scripts/pasd_cost.py
python scripts/pasd_cost.py --side 2048 --kernel-size 17
"""

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import torch
import typer
from diffattn.pipelines.pixel_aware_sr import PASDControlNetModel, PASDUNet2DConditionModel
from torch.utils.flop_counter import FlopCounterMode

import diffattn
from diffattn.grid import TokenGrid
from diffattn.mechanisms import SoftmaxAttention

STEPS, HALVES = 20, 2
SD15: dict[str, Any] = {
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
    "block_out_channels": (320, 640, 1280, 1280),
}
TINY: dict[str, Any] = {
    "cross_attention_dim": 12,
    "attention_head_dim": 2,
    "block_out_channels": (16, 24, 32, 32),
    "norm_num_groups": 8,
}
app = typer.Typer(rich_markup_mode=None)


class Networks:
    """U-Net and ControlNet of one size with one call's arguments, batch 2 for guidance."""

    def __init__(self, config: dict[str, Any], side: int, variant: str) -> None:
        """Untrained; `side` is that of the image in pixels."""
        self.unet = PASDUNet2DConditionModel(**config, pixel_attention=variant).eval()
        self.controlnet = PASDControlNetModel(**config).eval()
        self.picture = torch.rand(HALVES, 3, side, side)
        self.latents = torch.randn(HALVES, 4, side // 8, side // 8)
        self.text = torch.randn(HALVES, 77, config["cross_attention_dim"])

    def encode(self, batch: int = 1) -> torch.Tensor:
        """What the condition encoder makes of the image."""
        return self.controlnet.encode_condition(self.picture[:batch])

    def step(self, condition: torch.Tensor) -> torch.Tensor:
        """Both networks once."""
        call = self.latents, torch.tensor(500, device=self.latents.device), self.text
        down, mid = self.controlnet(*call, condition, return_dict=False)
        residuals = {"down_block_additional_residuals": tuple(down), "mid_block_additional_residual": mid}
        predicted: torch.Tensor = self.unet(*call, **residuals, return_dict=False)[0]
        return predicted


def count(call: Callable[[], Any]) -> int:
    """FLOPs of a call, multiplications and additions."""
    with FlopCounterMode(display=False) as counter:
        call()
    return int(counter.get_total_flops())


def saved_flops(handle: diffattn.Handle, config: dict[str, Any], side: int) -> int:
    """What local windows take off one step in the swapped layers, by the mechanisms' own formulas.

    The counter cannot see into every kernel, and windows do not run on the meta device.
    """
    full, saved, widths = SoftmaxAttention(), 0, config["block_out_channels"]
    for layer in handle.layers:
        level = len(widths) - 1 - int(layer.name.split(".")[1])
        cells, heads = side // 8 // 2**level, config["attention_head_dim"]
        if cells >= side // 16:
            shape = TokenGrid(cells, cells), heads, widths[level] // heads
            saved += HALVES * (full.flops(*shape) - layer.mechanism.flops(*shape))
    return saved


@contextmanager
def windows(networks: Networks, kernel_size: int, coarsest: int) -> Iterator[diffattn.Handle]:
    """Neighborhood attention in the pixel-aware and self-attention layers of at least `coarsest` tokens."""
    options = {"kernel_size": kernel_size, "min_tokens": coarsest}
    with diffattn.apply(networks.unet, "neighborhood", layers="*up_blocks*", **options) as handle:
        yield handle


@torch.no_grad()
def flops_table(side: int, kernel_size: int, variant: str) -> list[tuple[str, float]]:
    """TFLOP of a whole image at full size: rows of name and number; nothing is computed, on the meta device."""
    with torch.device("meta"):
        networks = Networks(SD15, side, variant)
        condition = networks.encode(HALVES)
        encode, step = count(networks.encode), count(lambda: networks.step(condition))
        with windows(networks, kernel_size, (side // 16) ** 2) as handle:
            saved = saved_flops(handle, SD15, side)
    rgbs = 2 * 3 * 9 * sum(c * (side // f) ** 2 for c, f in zip((32, 96, 256), (2, 4, 8), strict=True))
    official = STEPS * (step + HALVES * (encode + rgbs))
    cached = STEPS * step + encode
    return [
        ("released pattern: condition encoder at every step, for both guidance branches", official / 1e12),
        ("condition encoded once", cached / 1e12),
        (f"and windows of {kernel_size} in the up blocks' two finest levels", (cached - STEPS * saved) / 1e12),
    ]


@torch.no_grad()
def measure(side: int, kernel_size: int, rounds: int) -> list[tuple[str, list[float], float]]:
    """Seconds of a step of a tiny model, interleaved, and the error of each way against full attention."""
    torch.manual_seed(0)
    networks = Networks(TINY, side, "full")

    condition = networks.encode().expand(HALVES, -1, -1, -1)

    def official() -> torch.Tensor:
        return networks.step(networks.encode(HALVES))

    def cached() -> torch.Tensor:
        return networks.step(condition)

    def local() -> torch.Tensor:
        with windows(networks, kernel_size, (side // 16) ** 2):
            return cached()

    calls = {"released pattern": official, "condition encoded once": cached, "and windows": local}
    want = {name: call() for name, call in calls.items()}
    spent: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            spent[name].append(time.perf_counter() - start)
    full = want["condition encoded once"]
    return [(name, spent[name], float((want[name] - full).norm() / full.norm())) for name in calls]


@app.command()
def main(
    side: Annotated[int, typer.Option(help="Side of the image in pixels, a multiple of 64.")] = 1024,
    kernel_size: Annotated[int, typer.Option(help="Window of neighborhood attention, odd.")] = 17,
    rounds: Annotated[int, typer.Option(help="Rounds of the measurement; 0 leaves it out.")] = 3,
) -> None:
    """Print both tables in Markdown."""
    for variant in ("full", "light"):
        typer.echo(f"| TFLOP of {STEPS} steps with guidance at {side} x {side}, {variant} form | TFLOP | share |")
        typer.echo("|---|---|---|")
        rows = flops_table(side, kernel_size, variant)
        for name, teraflops in rows:
            typer.echo(f"| {name} | {teraflops:.1f} | {teraflops / rows[0][1]:.3f} |")
        typer.echo("")
    if rounds:
        threads = torch.get_num_threads()
        typer.echo(
            f"| tiny model, a step with guidance, {side} px, {threads} CPU threads | s (least-most) | ratio | error |"
        )
        typer.echo("|---|---|---|---|")
        measured = measure(side, kernel_size, rounds)
        first = statistics.median(measured[0][1])
        for name, seconds, error in measured:
            middle, spread = statistics.median(seconds), f"{min(seconds):.2f}-{max(seconds):.2f}"
            typer.echo(f"| {name} | {middle:.2f} ({spread}) | {first / middle:.2f} | {error:.1e} |")


if __name__ == "__main__":
    app()
