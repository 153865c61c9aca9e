"""What `diffattn upscale` does: settings that are checked, a pipeline of the checkpoint's kind, images through it."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from PIL import Image
from PIL.Image import Resampling

from diffattn.media.pictures import Picture
from diffattn.options import Help, at_least, check_fields

from ..checkpoint.bases import check_base
from ..checkpoint.loading import find_checkpoint
from ..pipeline import PARTS, PASDPipeline
from ..pipeline_xl import PARTS as XL_PARTS
from ..pipeline_xl import PASDXLPipeline
from ..sampling.preprocess import target_size
from ..settings import check_tiles

TILES = "Tiles"
SCALE = 4.0
"""Default factor of both sides."""


@dataclass(frozen=True, kw_only=True)
class Networks:
    """Which networks: a checkpoint of PASD, its base model, and what changes that one."""

    checkpoint: Path
    base: str
    stylize: str | None = None
    style_weight: float | None = None
    """None: 1."""
    lora: Path | None = None

    def __post_init__(self) -> None:
        if self.style_weight is not None and self.stylize is None:
            raise ValueError("--style-weight is the share of another model: add --stylize")
        if self.style_weight is not None and not 0.0 <= self.style_weight <= 1.0:
            raise ValueError(f"expected --style-weight from 0 to 1; got {self.style_weight}; 1 is the default")
        if self.lora is not None and (not self.lora.is_file() or self.lora.suffix != ".safetensors"):
            raise ValueError(f"expected a .safetensors file for --lora; got {self.lora}; check the name")
        if self.is_xl and self.stylize is not None:
            raise ValueError(
                "--stylize goes with Stable Diffusion 1.5; this checkpoint is SDXL's: give the model as --base"
            )
        check_base(self.base, XL_PARTS if self.is_xl else PARTS)

    @property
    def is_xl(self) -> bool:
        """Is the checkpoint SDXL's? Raises `ValueError` for a folder without a checkpoint."""
        file = find_checkpoint(self.checkpoint) / "controlnet" / "config.json"
        try:
            return bool(json.loads(file.read_text()).get("addition_embed_type") == "text_time")
        except (OSError, ValueError) as error:
            raise ValueError(f"cannot read {file}: {error}; download it again") from error

    def open(self, device: torch.device, dtype: torch.dtype) -> Any:
        """The pipeline on its device; raises `ValueError` for parts that do not belong together."""
        if self.is_xl:
            pipe = PASDXLPipeline.from_checkpoint(self.checkpoint, self.base, dtype=dtype)
        else:
            weight = 1.0 if self.style_weight is None else self.style_weight
            pipe = PASDPipeline.from_checkpoint(
                self.checkpoint, self.base, stylize=self.stylize, style_weight=weight, dtype=dtype
            )
        if self.lora is not None:
            load_lora(pipe, self.lora)
        return pipe.to(device)


def load_lora(pipe: Any, file: Path) -> None:
    """Put a LoRA in diffusers' or kohya's format on the pipeline; raises `ValueError` where it has none for it."""
    try:
        pipe.load_lora_weights(str(file.parent), weight_name=file.name)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ValueError(f"cannot load the LoRA {file}: {str(error).strip().splitlines()[0]}") from error
    if not pipe.get_list_adapters():
        raise ValueError(f"expected a LoRA of the base model in {file}; no weight in it fits; check the file")


@dataclass(frozen=True, kw_only=True)
class Restoration:
    """How every image is restored; None leaves the choice to the pipeline."""

    prompt: Annotated[str, Help("What all the images show.")] = ""
    negative_prompt: Annotated[str | None, Help("What they are not to look like. Default: the authors'.")] = None
    scale: Annotated[float | None, Help("Factor of both sides, above 0. Default: 4.")] = None
    colorize: Annotated[bool, Help("Give gray images colours, at their own size; keeps their luma.")] = False
    steps: Annotated[int | None, at_least(1), Help("Denoising steps. Default: 20, or 25 for SDXL.")] = None
    guidance: Annotated[float | None, Help("Guidance scale. Default: 9, or 7 for SDXL.")] = None
    conditioning_scale: Annotated[float | None, Help("Weight of the image. Default: 1, or 0.8 for SDXL.")] = None
    tile: Annotated[int, Help("Longest side in pixels that is restored at once.", panel=TILES)] = 1024
    tile_overlap: Annotated[int, Help("In pixels.", panel=TILES)] = 128
    tile_batch: Annotated[int, Help("Tiles at a time: faster on a GPU, for more memory.", panel=TILES)] = 1
    color_fix: Annotated[
        Literal["wavelet", "adain", "none"] | None,
        Help("How the result gets the colours of the input. Default: wavelet."),
    ] = None
    official: Annotated[bool, Help("Also what the released code does where it is wrong.")] = False
    seed: int = 0
    """Of each image: what becomes of one does not depend on the others."""

    def __post_init__(self) -> None:
        check_fields(self)
        if self.colorize and self.scale is not None:
            raise ValueError("--colorize keeps the size of an image: leave --scale out")
        if self.colorize and self.color_fix is not None:
            raise ValueError("--colorize makes colours, which --color-fix takes from the input: leave one of them out")
        if not 0.0 < self.factor < float("inf"):
            raise ValueError(f"expected --scale above 0; got {self.scale}; {SCALE:g} is the default")
        check_tiles(self.tile, self.tile_overlap, self.tile_batch)

    @property
    def factor(self) -> float:
        """Of both sides."""
        return 1.0 if self.colorize else SCALE if self.scale is None else self.scale

    def restore(self, pipe: Any, picture: Picture) -> Picture:
        """The image, restored; its opacity enlarged by Lanczos."""
        image = Image.fromarray(picture.pixels)
        self._tile_vae(pipe, image)
        result = pipe(image, self.prompt, **self._call()).images[0]
        alpha = picture.alpha
        if alpha is not None:
            alpha = np.asarray(Image.fromarray(alpha).resize(result.size, Resampling.LANCZOS))
        return Picture(np.asarray(result), alpha, picture.icc)

    def _call(self) -> dict[str, Any]:
        return {
            "negative_prompt": self.negative_prompt,
            "upscale": self.factor,
            "task": self._task,
            "num_inference_steps": self.steps,
            "guidance_scale": self.guidance,
            "conditioning_scale": self.conditioning_scale,
            "tile_size": self.tile,
            "tile_overlap": self.tile_overlap,
            "tile_batch": self.tile_batch,
            "color_fix": None if self.color_fix == "none" else self.color_fix or "wavelet",
            "official": self.official,
            "generator": torch.Generator("cpu").manual_seed(self.seed),
        }

    @property
    def _task(self) -> str:
        return "grayscale" if self.colorize else "realisr"

    def _tile_vae(self, pipe: Any, image: Image.Image) -> None:
        """The VAE in tiles where the networks work in tiles; the official VAE tiles are the pipeline's own."""
        size = target_size(*image.size, upscale=self.factor, process_size=pipe.defaults.process_size, task=self._task)
        if max(size) > self.tile and not self.official:
            pipe.vae.enable_tiling()
        else:
            pipe.vae.disable_tiling()
