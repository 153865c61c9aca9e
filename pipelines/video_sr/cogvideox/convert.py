"""STAR's official CogVideoX checkpoint as a folder of a diffusers pipeline.

    convert("star-cogvideox-5b", "star-cogvideox", vae="CogVideoX-5b/vae", text_encoder="CogVideoX-5b/text_encoder",
            tokenizer="CogVideoX-5b/tokenizer", dtype=torch.bfloat16)
    pipe = CogVideoXSTARPipeline.from_pretrained("star-cogvideox", torch_dtype=torch.bfloat16)

The checkpoint holds the transformer alone; the other parts are those of CogVideoX-5B. LoRA is merged into the weights,
share by share of the rows of each layer:

    W_j += B_j A_j alpha / r            alpha = 1, r = 512 as released
"""

import logging
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLCogVideoX
from torch import Tensor
from transformers import AutoTokenizer, T5EncoderModel

from diffattn.files.weights import Weights, cast, check_keys, load, load_strictly, named_tensors, read_weights
from diffattn.files.writing import check_new_folder, new_folder

from .names import PARTITIONS, UNUSED, lora_layer, official_place
from .pipeline import CogVideoXSTARPipeline
from .scheduler import STARCogVideoXScheduler
from .transformer import STARCogVideoXTransformer3DModel

logger = logging.getLogger("diffattn")

FILE = "mp_rank_00_model_states.pt"
PREFIX = "model.diffusion_model."
LORA_ALPHA = 1.0
_OTHER_VARIANT = re.compile(r"(VideoControlNet\.|input_blocks\.\d|middle_block\.\d|output_blocks\.\d).*")


@dataclass(frozen=True, kw_only=True)
class CogVideoXSizes:
    """Sizes of the transformer; the defaults are STAR's, those of CogVideoX-5B."""

    layers: int = 42
    heads: int = 48
    head_width: int = 64
    text_width: int = 4096
    text_tokens: int = 226
    time_width: int = 512
    latent_channels: int = 16
    latent_height: int = 60
    """Of the latents that the model was trained on; so is `latent_width`."""
    latent_width: int = 90

    def transformer(self) -> dict[str, Any]:
        """Settings of `STARCogVideoXTransformer3DModel`."""
        return {
            "num_layers": self.layers,
            "num_attention_heads": self.heads,
            "attention_head_dim": self.head_width,
            "text_embed_dim": self.text_width,
            "max_text_seq_length": self.text_tokens,
            "time_embed_dim": self.time_width,
            "in_channels": 2 * self.latent_channels,
            "out_channels": self.latent_channels,
            "sample_height": self.latent_height,
            "sample_width": self.latent_width,
            "use_rotary_positional_embeddings": True,
        }


def convert(
    checkpoint: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    *,
    vae: Any,
    text_encoder: Any,
    tokenizer: Any,
    dtype: torch.dtype = torch.float32,
    sizes: CogVideoXSizes | None = None,
    strict: bool = True,
) -> Path:
    """Write what `load_official` reads to `folder`, whole or not at all; see there for the arguments."""
    folder = check_new_folder(folder)
    pipe = load_official(
        checkpoint, vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, dtype=dtype, sizes=sizes, strict=strict
    )
    with new_folder(folder) as temporary:
        pipe.save_pretrained(temporary)
    return folder


def load_official(
    checkpoint: str | os.PathLike[str],
    *,
    vae: Any,
    text_encoder: Any,
    tokenizer: Any,
    dtype: torch.dtype = torch.float32,
    sizes: CogVideoXSizes | None = None,
    strict: bool = True,
) -> CogVideoXSTARPipeline:
    """A pipeline with the weights of the official checkpoint.

    Args:
        checkpoint: the released folder with `1/mp_rank_00_model_states.pt`, that file, or a safetensors file with the
            same names; no code in it is run.
        vae: of CogVideoX-5B: its folder or the loaded model; so are `text_encoder` and `tokenizer`.
        text_encoder: T5-XXL.
        tokenizer: T5's.
        dtype: of all networks.
        sizes: None: the official ones.
        strict: False leaves weights that the transformer does not have behind with a warning, instead of refusing them.

    Raises `ValueError` that names every weight that is missing, unexpected or of another shape, by its official name,
    and for a checkpoint of the I2VGen-XL variant.
    """
    weights = read_official(checkpoint)
    transformer = load_transformer(weights, checkpoint, sizes or CogVideoXSizes(), dtype=dtype, strict=strict)
    return CogVideoXSTARPipeline(
        vae=_part(AutoencoderKLCogVideoX, vae).to(dtype),
        text_encoder=_part(T5EncoderModel, text_encoder).to(dtype),
        tokenizer=_part(AutoTokenizer, tokenizer),
        transformer=transformer,
        scheduler=STARCogVideoXScheduler(),
    )


def _part(cls: Any, given: Any) -> Any:
    return cls.from_pretrained(given) if isinstance(given, str | os.PathLike) else given


def read_official(checkpoint: str | os.PathLike[str]) -> Weights:
    """The tensors of a checkpoint, without `module` and the prefix around them where it has these."""
    path = Path(checkpoint)
    if path.is_dir():
        found = [file for file in (path / FILE, *sorted(path.glob(f"*/{FILE}"))) if file.is_file()]
        if len(found) != 1:
            raise ValueError(f"expected one {FILE} in {path} or a folder in it; found {len(found)}; give the file")
        path = found[0]
    weights = read_weights(path) if path.suffix == ".safetensors" else _read_module(path)
    return {name.removeprefix(PREFIX): tensor for name, tensor in weights.items()}


def _read_module(path: Path) -> Weights:
    """The tensors under `module`; training states hold numbers of steps beside it."""
    if not path.is_file():
        raise ValueError(f"expected a file of weights; {path} does not exist")
    found = load(path)
    for wrapper in ("module", "state_dict"):
        found = found.get(wrapper, found) if isinstance(found, dict) else found
    return named_tensors(found, path)


def load_transformer(
    weights: Weights,
    source: object,
    sizes: CogVideoXSizes,
    *,
    dtype: torch.dtype = torch.float32,
    strict: bool = True,
) -> STARCogVideoXTransformer3DModel:
    """The transformer from weights with official names; `source` is for errors, see `load_official`."""
    if any(_OTHER_VARIANT.fullmatch(name) for name in weights):
        raise ValueError(
            f"expected STAR's CogVideoX checkpoint; {source} is one of the I2VGen-XL variant; convert it by "
            "diffattn.pipelines.video_sr.i2vgenxl.checkpoint.convert"
        )
    with torch.device("meta"):
        model = STARCogVideoXTransformer3DModel(**sizes.transformer())
    rank = lora_rank(weights)
    check(weights, official_shapes(model, rank), source, strict=strict)
    own = {key: cast(_taken(weights, key, rank), dtype) for key in model.state_dict()}
    load_strictly(model, own, source, assign=True)
    return model.eval()


def lora_rank(weights: Weights) -> int | None:
    """Rank of the LoRA pairs, None for a checkpoint with these merged already."""
    first = next((name for name in sorted(weights) if re.search(r"\.matrix_A\.\d+$", name)), None)
    merged = first is None and not any(".original." in name for name in weights)
    return None if merged else weights[first].shape[0] if first else 1


def official_shapes(model: STARCogVideoXTransformer3DModel, rank: int | None) -> dict[str, tuple[int, ...]]:
    """Shapes of the weights that a checkpoint of this model should have, with LoRA pairs of `rank`."""
    shapes: dict[str, tuple[int, ...]] = {}
    for key, tensor in model.state_dict().items():
        name, parts, chunks = official_place(key)
        rows = tensor.shape[0] // len(chunks) * parts
        layer = lora_layer(name)
        if layer is None or rank is None:
            shapes[name] = (rows, *tensor.shape[1:])
            continue
        kind = name.rpartition(".")[2]
        shapes[f"{layer}.original.{kind}"] = (rows, *tensor.shape[1:])
        for j in range(PARTITIONS[layer.rpartition(".")[2]] if kind == "weight" else 0):
            shapes[f"{layer}.matrix_A.{j}"] = (rank, tensor.shape[1])
            shapes[f"{layer}.matrix_B.{j}"] = (tensor.shape[0], rank)
    return shapes


def check(weights: Weights, wanted: dict[str, tuple[int, ...]], source: object, *, strict: bool) -> None:
    """Raise `ValueError` for weights that are not those that are wanted."""
    unexpected = {name for name in weights.keys() - wanted.keys() if not UNUSED.fullmatch(name)}
    if unexpected and not strict:
        logger.warning("left %d weights of %s behind: %s", len(unexpected), source, ", ".join(sorted(unexpected)))
        unexpected = set()
    check_keys(wanted.keys() - weights.keys(), unexpected, source)
    others = [
        f"{name} is {tuple(weights[name].shape)}, expected {shape}"
        for name, shape in wanted.items()
        if tuple(weights[name].shape) != shape
    ]
    if others:
        raise ValueError(f"the weights of {source} are not those of STAR's CogVideoX variant: {'; '.join(others)}")


def _taken(weights: Weights, key: str, rank: int | None) -> Tensor:
    """A weight of the transformer, in float32 where LoRA was added to it."""
    name, parts, chunks = official_place(key)
    layer, kind = lora_layer(name), name.rpartition(".")[2]
    if layer is None or rank is None:
        return _rows(weights[name], parts, chunks)
    whole = _rows(weights[f"{layer}.original.{kind}"], parts, chunks)
    if kind == "bias":
        return whole
    down, up = (weights[f"{layer}.matrix_{side}.{chunks[0]}"].float() for side in "AB")
    return whole.float() + up @ down * (LORA_ALPHA / rank)


def _rows(weight: Tensor, parts: int, chunks: tuple[int, ...]) -> Tensor:
    rows = weight.chunk(parts)
    return torch.cat([rows[i] for i in chunks]) if parts > 1 else weight
