"""Pieces of the page as HTML; every text that comes in is escaped, and images are in the page itself.

What moves (sliders, playing, clicks) is in page.js, which knows the classes that are written here.
"""

import base64
import html
import io
import math
from collections.abc import Sequence

import numpy as np
from PIL import Image

from ..grid import TokenGrid
from ..measure.strips import to_image
from ..measure.watching import Look
from ..media.drawing import ERROR_GAIN, error_map, heat_map
from ..media.seeing import Mass, seen_pixels
from .found import MOST_SIDE

SMALL = 384
"""Images with no longer side are shown with sharp pixels; frames with a longer one are compressed with loss."""
QUALITY = 92
"""Of JPEG."""
LEAST = 1e-3
"""Of the weights that are drawn, as a share of the largest."""


def escaped(text: object) -> str:
    return html.escape(str(text))


def data(image: Image.Image, form: str = "PNG") -> str:
    """An image as the value of `src`."""
    file = io.BytesIO()
    image.convert("RGB").save(file, form, quality=QUALITY)
    return f"data:image/{form.lower()};base64," + base64.b64encode(file.getvalue()).decode()


def img(image: Image.Image, alt: str, name: str = "", hidden: bool = False, form: str = "PNG") -> str:
    """An image with its text."""
    kind = " ".join(word for word in (name, "da-sharp" if max(image.size) <= SMALL else "") if word)
    off = " hidden" if hidden else ""
    return f'<img class="{kind}" src="{data(image, form)}" alt="{escaped(alt)}" draggable="false"{off}>'


def frame(image: Image.Image, alt: str, hidden: bool) -> str:
    """One of many images, which shall not weigh too much."""
    return img(image, alt, "da-frame", hidden, "PNG" if max(image.size) <= SMALL else "JPEG")


def figure(inside: str, caption: str) -> str:
    return f'<figure class="da-figure">{inside}<figcaption>{escaped(caption)}</figcaption></figure>'


def alert(text: str) -> str:
    """A line that stays until the next try, read aloud at once; nothing for an empty text."""
    return f'<div role="alert" class="da-alert"><b>Error:</b> {escaped(text)}</div>' if text else ""


def status(text: str = "", done: int = 0, of: int = 0) -> str:
    """What goes on, and how far it is."""
    if not text:
        return ""
    bar = f'<progress max="{of}" value="{min(done, of)}" aria-label="Denoising steps done"></progress>' if of else ""
    return f'<div role="status" class="da-status"><span>{escaped(text)}</span>{bar}</div>'


def notes(lines: Sequence[str]) -> str:
    """Lines that the library logged."""
    if not lines:
        return ""
    return "<ul class='da-notes'>" + "".join(f"<li>{escaped(line)}</li>" for line in lines) + "</ul>"


def table(head: Sequence[str], rows: Sequence[Sequence[str]], caption: str) -> str:
    """The first entry of a row names it."""
    top = "".join(f'<th scope="col">{escaped(one)}</th>' for one in head)
    body = "".join(
        f'<tr><th scope="row">{escaped(row[0])}</th>' + "".join(f"<td>{escaped(one)}</td>" for one in row[1:]) + "</tr>"
        for row in rows
    )
    return (
        f'<div class="da-scroll" tabindex="0" role="region" aria-label="{escaped(caption)}"><table class="da-table">'
        f"<caption><span>{escaped(caption)}</span></caption><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def decibels(value: float) -> str:
    """PSNR in words."""
    return f"{value:.1f} dB" if math.isfinite(value) else "identical"


def wipe(first: Image.Image, second: Image.Image, names: tuple[str, str]) -> str:
    """Two images of one size over each other, with a slider between them, and where they differ."""
    a, b = (f"image {place}: {name}" for place, name in zip("AB", names, strict=True))
    both = (
        f'<div class="da-wipe">{img(first, a, "da-under")}{img(second, b, "da-over")}<span class="da-line"></span>'
        f'</div><label class="da-range"><span>A</span><input type="range" min="0" max="100" value="50" '
        f'class="da-wipe-at" aria-label="Where A ends and B begins, in percent of the width"><span>B</span></label>'
    )
    heat = heat_map(error_map(first, second) * ERROR_GAIN)
    difference = img(heat, "where A and B differ: white is alike, black is half the range of a channel or more")
    return (
        '<div class="da-row">'
        + figure(both, f"left of the line A, {names[0]}; right of it B, {names[1]}")
        + figure(difference, "difference of A and B: largest of the three channels, white where they are alike")
        + "</div>"
    )


def player(first: Sequence[Image.Image], second: Sequence[Image.Image], names: tuple[str, str], rate: float) -> str:
    """Two clips side by side, on one slider; the shorter one stays at its last frame."""
    count = max(len(first), len(second))
    parts = []
    for place, frames, name in zip("AB", (first, second), names, strict=True):
        inside = "".join(
            frame(image, f"{place}, frame {number + 1} of {len(frames)}: {name}", hidden=number > 0)
            for number, image in enumerate(frames)
        )
        parts.append(figure(f'<div class="da-frames">{inside}</div>', f"{place}: {name}"))
    return (
        f'<div class="da-player" data-rate="{rate:g}"><div class="da-row">{"".join(parts)}</div>'
        '<div class="da-controls">'
        '<button type="button" class="da-play" aria-pressed="false">Play</button>'
        '<button type="button" class="da-step" data-by="-1" aria-label="One frame back">&#x2039;</button>'
        '<button type="button" class="da-step" data-by="1" aria-label="One frame on">&#x203a;</button>'
        f'<input type="range" class="da-at" min="0" max="{count - 1}" value="0" aria-label="Frame of both clips">'
        f'<output class="da-number">frame 1 of {count}</output></div></div>'
    )


def pixels_as_images(pixels: np.ndarray) -> list[Image.Image]:
    """An image, or the frames of a video, no longer than `MOST_SIDE`."""
    images = [to_image(frame) for frame in (pixels if pixels.ndim == 4 else pixels[None])]
    if len(images) > 1:
        for image in images:
            image.thumbnail((MOST_SIDE, MOST_SIDE))
    return images


def token_map(image: Image.Image, grid: TokenGrid, cell: tuple[int, int], look: Look) -> str:
    """The image, on which cells can be chosen, under what the query sees; what it sees of the image; its weights."""
    row, column = cell
    pixels = np.asarray(image.convert("RGB")) / 255.0
    by_mean = look.blocks.any(0) & ~look.keys if len(look.blocks) else np.zeros_like(look.keys)
    unseen = ~look.keys & ~by_mean
    layers = [
        _cells(grid, unseen, "da-unseen"),
        *(_cells(grid, block & ~look.keys, "da-mean") for block in look.blocks),
        _cells(grid, look.keys, "da-key"),
        f'<rect class="da-query" x="{column}" y="{row}" width="1" height="1"/>',
    ]
    words = f"row {row}, column {column} sees {look.keys.sum()} cells exactly and {by_mean.sum()} by a mean"
    over = (
        f'<svg viewBox="0 0 {grid.width} {grid.height}" preserveAspectRatio="none" aria-hidden="true">'
        + "".join(layers)
        + "</svg>"
    )
    chosen = (
        f'<div class="da-map" tabindex="0" role="application" data-row="{row}" data-column="{column}" '
        f'data-rows="{grid.height}" data-columns="{grid.width}" '
        f'aria-label="Choose a token by a click or the arrow keys. {words}">{img(image, words)}{over}</div>'
    )
    seen = Image.fromarray((seen_pixels(pixels, grid, look.keys, look.blocks) * 255).round().astype(np.uint8))
    cells = look.mass[grid.cell_slice].reshape(grid.height, grid.width)
    heat = heat_map(1 + np.log10(np.maximum(cells / max(cells.max(), LEAST), LEAST)) / -math.log10(LEAST))
    return (
        '<div class="da-row da-three">'
        + figure(
            chosen, "choose a token: red the query, blue exact keys, orange blocks seen by their mean, dark unseen"
        )
        + figure(img(seen, f"the image as {words}"), "the image as the query sees it")
        + figure(
            img(heat, "full attention's weight on every cell, darker is more"),
            "where full attention would look: black the largest weight, white a thousandth of it or less",
        )
        + "</div>"
    )


def _cells(grid: TokenGrid, chosen: np.ndarray, name: str) -> str:
    """Cells as runs of a row, in one path."""
    rows = np.pad(chosen.reshape(grid.height, grid.width), ((0, 0), (1, 1))).astype(int)
    path = []
    for row, edges in enumerate(np.diff(rows, axis=1)):
        for begin, end in zip(np.flatnonzero(edges > 0), np.flatnonzero(edges < 0), strict=True):
            path.append(f"M{begin} {row}h{end - begin}v1h{begin - end}z")
    return f'<path class="{name}" d="{"".join(path)}"/>' if path else ""


def mass_table(grid: TokenGrid, look: Look) -> str:
    """What the query sees, and how much of full attention's weight lies there."""
    mass = Mass.of(grid, look.keys, look.blocks, look.mass)
    by_mean = look.blocks.any(0) & ~look.keys if len(look.blocks) else np.zeros_like(look.keys)
    rows = [
        ("exact keys", f"{look.keys.sum()} cells", f"{mass.keys:.1%}"),
        ("seen by a mean", f"{by_mean.sum()} cells in {len(look.blocks)} blocks", f"{mass.means:.1%}"),
        ("not seen", f"{(~look.keys & ~by_mean).sum()} cells", f"{mass.unseen:.1%}"),
        ("other tokens, such as text", f"{grid.others}", f"{mass.others:.1%}"),
    ]
    return table(("keys", "how many", "full attention's weight on them"), rows, "What the query sees")
