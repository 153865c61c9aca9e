"""Write what the levels of quality gain on an H100 at usual sizes, modelled, into a Markdown file.

    python scripts/numbers/modelled_levels.py docs/tuning.md

The models lie on the meta device, with the configs that diffusers' classes have by default.
"""

from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from diffusers import (
    FluxTransformer2DModel,
    LTXVideoTransformer3DModel,
    QwenImageTransformer2DModel,
    WanTransformer3DModel,
)

from diffattn import estimate
from diffattn.swap.settings.quality import LEVELS

MARKERS = "<!-- levels -->", "<!-- /levels -->"
Size = tuple[int, int, int]
"""Width, height, frames."""
MODELS: list[tuple[str, Any, dict[str, Any], int, int, list[Size]]] = [
    ("FLUX.1-dev", FluxTransformer2DModel, {"guidance_embeds": True}, 1, 28, [(s, s, 1) for s in (1024, 2048, 4096)]),
    ("Wan 2.2 A14B", WanTransformer3DModel, {}, 2, 40, [(832, 480, 81), (1280, 720, 81)]),
    ("Qwen-Image", QwenImageTransformer2DModel, {}, 2, 50, [(1328, 1328, 1), (2048, 2048, 1)]),
    ("LTX-Video", LTXVideoTransformer3DModel, {}, 2, 40, [(704, 512, 161), (1536, 1024, 161)]),
]
"""Name, class, its config, samples of a forward (guidance makes two), steps, sizes."""


def rows() -> list[str]:
    """The table."""
    levels = LEVELS["routing"]
    lines = [f"| model, size | tokens | attention | {' | '.join(f'`{level}`' for level in levels)} |"]
    lines.append("|---|---:|---:" + "|---:" * len(levels) + "|")
    for name, kind, config, batch, steps, sizes in MODELS:
        with torch.device("meta"):
            model = kind(**config).to(torch.bfloat16)
        for width, height, frames in sizes:
            call: dict[str, Any] = {"width": width, "height": height, "batch": batch, "num_inference_steps": steps}
            call |= {"frames": frames} if frames > 1 else {}
            found = [estimate(model, "routing", quality=level, card="H100", **call)[0] for level in levels]
            size = f"{width} x {height}" + (f", {frames} frames" if frames > 1 else "")
            cells = [str(found[0].grid).replace("x", " x "), f"{found[0].attention:.0%}"]
            cells += [f"{one.speedup:.2f}x" for one in found]
            lines.append(f"| {name}, {size} | {' | '.join(cells)} |")
            typer.echo(lines[-1])
    return lines


def main(page: Annotated[Path, typer.Argument(help="Markdown file with the markers.")]) -> None:
    """Write the table."""
    text = page.read_text(encoding="utf-8")
    before, (_, after) = text.partition(MARKERS[0])[0], text.partition(MARKERS[1])[1:]
    page.write_text("\n".join([before + MARKERS[0], *rows(), MARKERS[1]]) + after, encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
