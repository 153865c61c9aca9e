"""What the files of a cache are made from and by, as their metadata say: what has changed since is encoded anew."""

import logging
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from ..encoders import Facts
from .cache_facts import ORIGIN, POSTERIOR, Shapes
from .clips import Cut, digest_of
from .fingerprints import of
from .pictures import Captioned, named

logger = logging.getLogger("diffattn")

UNKNOWN = "-"
"""What a file says of encoders that are not in memory."""


class Origins:
    """Compares files with what they would be made from now; those that say nothing are kept."""

    def __init__(self, maker: str | None, facts: Facts, dtype: torch.dtype) -> None:
        self._maker, self._facts, self._dtype = maker, facts, dtype
        self._changed: list[str] = []
        self._unknown: list[str] = []

    def of(self, picture: Captioned, shapes: Shapes) -> str:
        """What a file with tensors of `shapes` says: two fingerprints, of image and caption and of the encoders."""
        parts: list[Any] = [str(self._dtype)]
        if "mean" in shapes:
            parts += [*self._content(picture.path), self._facts["picture_size"]]
        if shapes.keys() - set(POSTERIOR):
            parts += [picture.caption, self._facts["text_length"]]
        return f"{of(*parts)} {self._maker or UNKNOWN}"

    def _content(self, path: Path) -> list[Any]:
        """What tells an image or a clip from others; a file's bytes, of a video but their hash."""
        cut = Cut.of(self._facts)
        return [path.read_bytes()] if cut is None else [digest_of(path), cut.facts]

    def holds(self, path: Path, wanted: str, name: str) -> bool:
        """Whether a whole file was made from what it would be made from now; `ValueError` for other encoders."""
        with safe_open(path, framework="pt") as file:
            said = (file.metadata() or {}).get(ORIGIN)
        if said is None:
            self._unknown.append(name)
            return True
        (source, maker), (new_source, new_maker) = said.split(" "), wanted.split(" ")
        if UNKNOWN not in (maker, new_maker) and maker != new_maker:
            raise ValueError(
                f"{path} was encoded by another VAE or text encoder, or in another precision; use another folder, or "
                f"delete the .safetensors files there to encode anew"
            )
        if source != new_source:
            self._changed.append(name)
        return source == new_source

    def tell(self, folder: Path) -> None:
        """Say once what was made anew, and what may be out of date."""
        if self._changed:
            logger.warning("images or captions have changed, encoded anew: %s", named(sorted(set(self._changed))))
        if self._unknown:
            logger.warning(
                "files in %s do not say what they were made from, kept: %s; delete them if images or captions have "
                "changed",
                folder,
                named(sorted(set(self._unknown))),
            )
