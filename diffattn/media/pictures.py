"""Images in files: found, read as 8-bit RGB the right way up, written whole or not at all, laid side by side."""

import glob
import logging
import os
import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont, ImageOps, UnidentifiedImageError

from diffattn.files.writing import written

PICTURE_ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
"""Endings of what counts as an image in a folder."""

UNREAD_ENDINGS = (".avif", ".heic", ".heif", ".gif", ".jp2", ".j2k", ".jxl", ".psd", ".svg", ".dng", ".cr2", ".nef")
"""Endings of images that a folder may hold, and that are left out of it with a line."""

FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
"""Endings that `write_picture` takes."""

LONGEST_SIDE = {"PNG": 2**31 - 1, "JPEG": 65500, "WEBP": 16383}
"""What each format holds, in pixels."""

_LABEL, _GAP = 16, 4
"""Least height of the text on a comparison sheet, and the space around it, in pixels."""

Pixels = NDArray[np.uint8]

logger = logging.getLogger("diffattn")


@dataclass(frozen=True, eq=False)
class Picture:
    """An image as it is shown."""

    pixels: Pixels
    """RGB, `(rows, columns, 3)`."""
    alpha: Pixels | None = None
    """Opacity, 0 clear to 255 opaque, `(rows, columns)`; None for a format or file without it."""
    icc: bytes | None = None
    """Colour profile of RGB values; None for sRGB, and where the file's profile was of gray or CMYK values."""

    @property
    def on_white(self) -> Pixels:
        """The pixels without opacity: what is clear shows white."""
        if self.alpha is None:
            return self.pixels
        return np.asarray(_on_white(Image.fromarray(self.pixels), Image.fromarray(self.alpha)))


def read_picture(path: str | os.PathLike[str] | BinaryIO) -> Picture:
    """Read the first frame of an image file, or of a file in memory, turned as its EXIF orientation says.

    Gray, palette, CMYK and 1-bit images become RGB. Of 16 bits a channel the upper 8 are left: gray ones are rounded
    here; colour ones Pillow itself cuts off.

    Raises:
        ValueError: an empty or cut off file, none of an image, or one of a kind without a conversion to RGB.
    """
    try:
        with Image.open(path) as image:
            icc = image.info.get("icc_profile")
            _tell_frames(path, image)
            pixels, alpha = _split(ImageOps.exif_transpose(image))
    except (FileNotFoundError, IsADirectoryError, PermissionError):
        raise
    except UnidentifiedImageError as error:
        what = "a file of another kind" if _size(path) else "an empty file"
        raise ValueError(f"expected an image in {path}; got {what}; leave it out or convert it") from error
    except (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError) as error:
        raise ValueError(f"expected a whole image in {path}; got: {error}; make the file anew") from error
    return Picture(pixels, alpha, icc if icc and icc[16:20] == b"RGB " else None)


def _size(path: str | os.PathLike[str] | BinaryIO) -> int:
    return path.seek(0, os.SEEK_END) if hasattr(path, "seek") else Path(path).stat().st_size


def _tell_frames(path: str | os.PathLike[str] | BinaryIO, image: Image.Image) -> None:
    """Say that a file has more than the image that is read; photographs with a small copy (MPO) apart."""
    count = getattr(image, "n_frames", 1)
    if count > 1 and image.format != "MPO":
        what = "pages" if image.format == "TIFF" else "frames"
        logger.warning("%s: has %d %s; only the first is read", path, count, what)


def _split(image: Image.Image) -> tuple[Pixels, Pixels | None]:
    """RGB and alpha of an image of any mode."""
    if image.mode == "F":
        raise ValueError("floating point pixels")
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError(f"integers of {values.min()} to {values.max()}, beyond 16 bits")
        gray = ((values + 128) // 257).astype(np.uint8)
        return np.repeat(gray[..., None], 3, axis=-1), None
    if image.mode[-1] in "Aa" or "transparency" in image.info:
        pixels = np.asarray(image.convert("RGBA"))
        return pixels[..., :3].copy(), pixels[..., 3].copy()
    return np.array(image.convert("RGB")), None


def write_picture(
    path: str | Path, pixels: Pixels, alpha: Pixels | None = None, icc: bytes | None = None, quality: int = 95
) -> Path:
    """Write an image as PNG, JPEG or WebP, by the ending of `path`, whole or not at all.

    Args:
        pixels: RGB, `(rows, columns, 3)`.
        alpha: opacity, `(rows, columns)`; JPEG, which has none, gets the image on white.
        icc: colour profile to put in.
        quality: of JPEG and WebP, 1-100.
    """
    target = Path(path)
    kind = FORMATS.get(target.suffix.lower())
    if kind is None:
        raise ValueError(f"expected a name that ends in {', '.join(FORMATS)}; got {target.name!r}; rename the output")
    if not 1 <= quality <= 100:
        raise ValueError(f"expected a quality from 1 to 100; got {quality}; 95 is usual")
    _check(pixels)
    if max(pixels.shape) > LONGEST_SIDE[kind]:
        raise ValueError(
            f"expected sides of at most {LONGEST_SIDE[kind]} pixels for {kind}; got {pixels.shape[0]} x "
            f"{pixels.shape[1]}; write a PNG"
        )
    image = Image.fromarray(pixels)
    if alpha is not None:
        if alpha.dtype != np.uint8 or alpha.shape != pixels.shape[:2]:
            raise ValueError(
                f"expected uint8 alpha of shape {pixels.shape[:2]}; got {alpha.dtype} of shape {alpha.shape}; resize it"
            )
        image = _with_alpha(image, Image.fromarray(alpha), kind)
    with written(target) as temporary:
        image.save(temporary, format=kind, icc_profile=icc, quality=quality)
    return target


def _with_alpha(image: Image.Image, alpha: Image.Image, kind: str) -> Image.Image:
    if kind != "JPEG":
        image.putalpha(alpha)
        return image
    return _on_white(image, alpha)


def _on_white(image: Image.Image, alpha: Image.Image) -> Image.Image:
    canvas = Image.new("RGB", image.size, "white")
    canvas.paste(image, mask=alpha)
    return canvas


def find_pictures(inputs: Sequence[str | Path]) -> list[Path]:
    """The image files that files, folders and patterns name, in that order and each once.

    A folder stands for the images right in it, and a pattern (`*`, `?`, `[..]`; `**` for all folders below) for those
    that match, in natural order: `2.png` before `10.png`. A file named by itself counts whatever its ending.

    Raises:
        ValueError: a name that leads to no image.
    """
    found: dict[Path, Path] = {}
    for given in inputs:
        path = Path(given)
        if path.is_file():
            files = [path]
        else:
            names = list(path.iterdir() if path.is_dir() else map(Path, glob.glob(str(given), recursive=True)))
            files = sorted((file for file in names if _looks_like_picture(file)), key=_natural)
            _tell_left_out(names)
        if not files:
            raise ValueError(
                f"expected an image, a folder of images or a pattern of their names; got {str(given)!r}, which "
                f"leads to no file that ends in {', '.join(PICTURE_ENDINGS)}; check the name"
            )
        for file in files:
            found.setdefault(file.resolve(), file)
    return list(found.values())


def _tell_left_out(names: Sequence[Path]) -> None:
    """Say which images of a folder are of a kind that is not read."""
    unread = [file for file in names if file.suffix.lower() in UNREAD_ENDINGS and not file.name.startswith(".")]
    for file in sorted(unread, key=_natural):
        logger.warning("%s: left out, %s files are not read; convert it to .png or .jpg", file, file.suffix.lower())


def _looks_like_picture(file: Path) -> bool:
    return file.suffix.lower() in PICTURE_ENDINGS and not file.name.startswith(".") and file.is_file()


def _natural(file: Path) -> list[tuple[str | int, ...]]:
    """Sort key of a path that takes digits as numbers, part by part."""
    return [
        tuple(int(piece) if number % 2 else piece.casefold() for number, piece in enumerate(re.split(r"(\d+)", part)))
        for part in file.parts
    ]


def side_by_side(pictures: Sequence[Pixels], labels: Sequence[str], height: int | None = None) -> Pixels:
    """A comparison sheet: images in a row on white, each with its label above.

    Args:
        height: that all are scaled to, in pixels; None for that of the highest.
    """
    if not pictures or len(pictures) != len(labels):
        raise ValueError(f"expected images with a label each; got {len(pictures)} and {len(labels)}; pair them up")
    for pixels in pictures:
        _check(pixels)
    rows = max(len(pixels) for pixels in pictures) if height is None else height
    if rows < 1:
        raise ValueError(f"expected a height of at least 1 pixel; got {height}; leave it out for that of the highest")
    images = [Image.fromarray(pixels) for pixels in pictures]
    images = [image.resize((max(1, round(image.width * rows / image.height)), rows)) for image in images]
    size = max(_LABEL, rows // 48)
    font = ImageFont.load_default(size)
    widths = [max(image.width, int(font.getlength(label)) + 1) for image, label in zip(images, labels, strict=True)]
    top = size + 2 * _GAP
    sheet = Image.new("RGB", (sum(widths) + _GAP * (len(images) + 1), top + rows + _GAP), "white")
    draw, left = ImageDraw.Draw(sheet), _GAP
    for image, label, width in zip(images, labels, widths, strict=True):
        draw.text((left, _GAP), label, fill="black", font=font)
        sheet.paste(image, (left, top))
        left += width + _GAP
    return np.asarray(sheet)


def _check(pixels: Pixels) -> None:
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3 or 0 in pixels.shape:
        raise ValueError(
            f"expected uint8 RGB pixels (rows, columns, 3), at least 1 x 1; got {pixels.dtype} of shape "
            f"{pixels.shape}; scale floats by 255 and put the channels last"
        )
