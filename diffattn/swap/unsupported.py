"""Models, pipelines and processors whose attention cannot be swapped though everything else about them looks familiar.

They are refused by name before anything is changed, with a row of one's own in `families.FAMILIES` too: a window would
lie on the wrong tokens, or the attention would stay dense without a word. A name counts for its subclasses.
"""

import inspect
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..families import Family
from ..grid import TokenGrid
from ..mechanisms.base import Mechanism
from .helpers import attending_helpers

_FRAMES_IN_TURN = "it makes a few frames at a time, and most of their keys are kept ones of earlier frames"
_FAR = f"{_FRAMES_IN_TURN}, in coarser patches; where it fills its cache it attends by a flex block mask of its own"
_REFINER = f"{_FRAMES_IN_TURN}; its forward tells no grid"
_ALL_IN_ONE = "it attends by a flex block mask of its own; set QwenImage21AttnProcessor on its layers"
_BLOCK_MASK = "it attends to its own frames and to kept keys of a reference, padded, by a flex block mask of its own"
_NABLA = "it puts its tokens into blocks and attends sparsely by itself (NABLA)"
_WINDOWS = "it attends in windows already, which it was trained with"
_EXACT = "diffattn.apply_exact computes them in bounded memory, to the same numbers"
_OMNI = "it puts several images into one sequence, and a window would lie on the first alone"
_BESIDE = (
    "it lays a given image beside the one it makes, in one feature map, and a window would see the seam of the given "
    "image alone"
)
_COPIED = "it puts copies of its scheduler's state in place in every step, so that steps can't be counted"
_OWN_PROCESSORS = "it sets attention processors of its own in every call, which would put the model's attention back"


@dataclass(frozen=True)
class Unsupported:
    """One class, by name; with `option` only where its config has that value."""

    name: str
    reason: str
    option: str | None = None
    value: Any = None
    remedy: str = "run it as it is"


UNSUPPORTED: list[Unsupported] = [
    Unsupported("QwenImage21FlexAttnProcessor", _ALL_IN_ONE),
    Unsupported("AnyFlowFARTransformer3DModel", _FAR),
    Unsupported("WanAnimate2Transformer3DModel", _BLOCK_MASK),
    Unsupported("SanaWMLTX2RefinerTransformer3DModel", _REFINER),
    Unsupported("Kandinsky5Transformer3DModel", _NABLA, "attention_type", "nabla"),
    Unsupported("Kandinsky6SRTransformer3DModel", _NABLA),
    Unsupported("LTX2VideoDiffusionDecoderModel", _WINDOWS, remedy=_EXACT),
    Unsupported("LTX2VideoDiffusionDecodePipeline", _WINDOWS, remedy=_EXACT),
    Unsupported("ZImageOmniPipeline", _OMNI),
    Unsupported("DreamLitePipeline", _BESIDE),
    Unsupported("DreamLiteMobilePipeline", _BESIDE),
    Unsupported("LEditsPPPipelineStableDiffusion", _OWN_PROCESSORS),
    Unsupported("LEditsPPPipelineStableDiffusionXL", _OWN_PROCESSORS),
    Unsupported("StableDiffusionAttendAndExcitePipeline", _OWN_PROCESSORS),
    Unsupported("StableDiffusionPix2PixZeroPipeline", _OWN_PROCESSORS),
    Unsupported("StableDiffusionPanoramaPipeline", _COPIED),
    Unsupported("StableDiffusionSAGPipeline", _OWN_PROCESSORS),
    Unsupported("TextToVideoZeroPipeline", _OWN_PROCESSORS),
    Unsupported("TextToVideoZeroSDXLPipeline", _OWN_PROCESSORS),
]


def check_supported(target: Any) -> None:
    """Raise `ValueError` for a pipeline, model or processor that is known to be impossible."""
    names = [cls.__name__ for cls in type(target).__mro__]
    for entry in UNSUPPORTED:
        if entry.name in names and (entry.option is None or _option(target, entry.option) == entry.value):
            raise ValueError(
                f"the attention of {type(target).__name__} can't be swapped: {entry.reason}; {entry.remedy}"
            )


def check_processor(processor: Any, known: Collection[str] = ()) -> None:
    """As `check_supported`, and for processors that attend in helper functions that are not `known`."""
    check_supported(processor)
    helpers = [name for name in attending_helpers(type(processor).__call__) if name not in known]
    if helpers:
        raise ValueError(
            f"the attention of {type(processor).__name__} can't be swapped: part of it is computed in "
            f"{', '.join(f'{name}()' for name in helpers)}, whose calls are not known; leave its layers out by layers="
        )


LINE = TokenGrid(1, 4096)
"""Stands for all lines in time."""


def reason_on_a_line(mechanism: Mechanism) -> str | None:
    """What a mechanism has against grids of one row of one frame, however long; None where it has nothing."""
    if mechanism.across_frames:
        return f"its tokens are a line in time, one row of one frame, within which {mechanism.type} changes nothing"
    if mechanism.across_rows:
        return f"its tokens are a line in time, one row of one frame, of which {mechanism.type} sees everything"
    try:
        mechanism.check(LINE)
    except ValueError as error:
        return f"its tokens are a line in time, one row such as {LINE}: {error}"
    return None


def reason_without_hidden(mechanism: Mechanism, module: Any) -> str | None:
    """Why a layer can't tell a mechanism what its queries are made of; None where it can, or nobody asks."""
    if "hidden" not in mechanism.needs:
        return None
    _, first, *_ = inspect.signature(type(module).forward).parameters
    query: Any = getattr(module, "to_q", None) or getattr(module, "to_query", None)
    normed = any(getattr(module, name, None) is not None for name in ("group_norm", "spatial_norm"))
    given = getattr(query, "in_features", None)
    if first != "hidden_states" or normed or given is None:
        return f"its queries are not projected from the hidden states that it is given, which {mechanism.type} sees"
    wanted = getattr(mechanism, "channels", given)
    wanted = query.out_features if wanted is None else wanted
    if wanted != given:
        return f"its hidden states have {given} channels, and {mechanism.type} sees {wanted}: give channels={given}"
    return None


def check_told(target: Any, family: Family, mechanisms: Sequence[Mechanism], counting: str | None) -> None:
    """Raise `ValueError` where something depends on a timestep or step that nothing tells the model."""
    if family.timestep is not None:
        return
    names = {"timestep"} if isinstance(target, nn.Module) else {"timestep", "progress", "sigma", "memory"}
    asking = [str(own) for own in mechanisms if own.needs & names]
    if asking or counting is not None:
        raise ValueError(
            f"no layer of a {family.name} model can carry {asking[0] if asking else counting}: it is not told its "
            "timestep, from which steps are counted; use options that need none, in every step"
        )


def _option(target: Any, name: str) -> Any:
    config = getattr(target, "config", None)
    return config.get(name) if isinstance(config, dict) else getattr(config, name, None)
