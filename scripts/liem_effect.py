"""What STAR's LIEM changes in front of a LayerNorm, in untrained networks of the recorded tiny sizes.

python scripts/liem_effect.py
"""

import statistics
from collections.abc import Iterator
from typing import Annotated, Any

import torch
import typer
from diffattn.pipelines.video_sr.gates import measure_gates
from diffattn.pipelines.video_sr.i2vgenxl.networks.components import STARSizes, build_networks
from diffattn.pipelines.video_sr.liem import LIEMSpatial, LIEMTemporal
from torch import nn

TINY = STARSizes(channels=(32, 64), attention=(True, True), layers=1, head_width=16, first_heads=4, text_width=24)
"""Of tests/golden/star/tiny_unet_denoise.json."""
SIZE = {"frames": 4, "height": 10, "width": 8}
app = typer.Typer(rich_markup_mode=None)


def liems(network: nn.Module) -> Iterator[Any]:
    """The modules of a network."""
    return (module for module in network.modules() if isinstance(module, LIEMSpatial | LIEMTemporal))


def networks(deviation: float | None, seed: int) -> tuple[Any, Any]:
    """U-Net and control branch whose zero convolutions are not zero; None leaves LIEM as it is initialised."""
    torch.manual_seed(seed)
    made = build_networks(TINY)
    for network in made.values():
        network.eval()
        if deviation is not None:
            for local in liems(network):
                nn.init.normal_(local.conv1.weight, std=deviation)
    for name, parameter in made["controlnet"].named_parameters():
        if name.startswith("controlnet_"):
            nn.init.normal_(parameter, std=0.05)
    return made["unet"], made["controlnet"]


def gradient_ratio(unet: Any, controlnet: Any, seed: int) -> float:
    """Median over other weights of |gradient| / |weight|, over that of the LIEMs, for a random loss."""
    generator = torch.Generator().manual_seed(seed)
    shape = (1, 4, SIZE["frames"], SIZE["height"], SIZE["width"])
    x, hint, target = (torch.randn(shape, generator=generator) for _ in range(3))
    text = torch.randn(1, 77, TINY.text_width, generator=generator)
    down, mid = controlnet(x, 500, text, hint, return_dict=False)
    residuals = {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}
    (unet(x, 500, text, **residuals, return_dict=False)[0] - target).square().mean().backward()
    groups: dict[bool, list[float]] = {True: [], False: []}
    for network in (unet, controlnet):
        for name, weight in network.named_parameters():
            if weight.grad is not None and float(weight.detach().norm()) > 0:
                groups[".local" in name].append(float(weight.grad.norm() / weight.detach().norm()))
    return statistics.median(groups[False]) / statistics.median(groups[True])


@app.command()
def main(seeds: Annotated[int, typer.Option(min=1, help="Networks for each row.")] = 8) -> None:
    """Print the table in Markdown."""
    typer.echo(
        "| deviation of LIEM's weights | gates | tokens where they act | change of the velocity | gradient ratio |"
    )
    typer.echo("|---|---|---|---|---|")
    for deviation in (None, 0.1, 0.3, 1.0):
        reports, ratios = [], []
        for seed in range(seeds):
            made = networks(deviation, seed)
            reports.append(measure_gates(*made, **SIZE, seed=seed))
            ratios.append(gradient_ratio(*made, seed))
        rows = [row for report in reports for row in report.rows]
        changes = [report.change for report in reports]
        typer.echo(
            f"| {'initial' if deviation is None else deviation} | {min(row.low for row in rows):.3f} to "
            f"{max(row.high for row in rows):.3f} | {statistics.mean(row.acting for row in rows):.2%} | "
            f"{statistics.median(changes):.1e} ({min(changes):.1e} to {max(changes):.1e}) | "
            f"{statistics.median(ratios):.0f} |"
        )


if __name__ == "__main__":
    app()
