"""Models, pipelines and processors whose attention cannot be swapped though everything else about them looks familiar.

They are refused by name before anything is changed, with a row of one's own in `families.FAMILIES` too: a window would
lie on the wrong tokens, or the attention would stay dense without a word. A name counts for its subclasses.
"""

import types
from dataclasses import dataclass
from typing import Any

from .intercept import DISPATCH, SDPA

_KEYS_BESIDE = "its image is asked alone and answered by text and image: it has fewer queries than keys"
_CACHE = "it keeps keys of earlier calls: it has fewer queries than keys"
_NABLA = "it puts its tokens into blocks and attends sparsely by itself (NABLA)"
_REFERENCE_CACHE = "it attends in a helper beside the processor, to cached keys of reference images in most steps"
_EXAMPLES = "it puts example images and the image it makes into one sequence, and a window would lie on an example"
_SEVERAL = "it makes several images in one sequence (layers), and a window would lie on the first alone"
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


UNSUPPORTED: list[Unsupported] = [
    Unsupported("PRXTransformer2DModel", _KEYS_BESIDE),
    Unsupported("NucleusMoEImageTransformer2DModel", _KEYS_BESIDE),
    Unsupported("StableCascadeUNet", _KEYS_BESIDE),
    Unsupported("Cosmos3OmniTransformer", _KEYS_BESIDE),
    Unsupported("QwenImage21Transformer2DModel", _CACHE),
    Unsupported("AnyFlowFARTransformer3DModel", _CACHE),
    Unsupported("WanAnimate2Transformer3DModel", _CACHE),
    Unsupported("SanaWMLTX2RefinerTransformer3DModel", _CACHE),
    Unsupported("Kandinsky5Transformer3DModel", _NABLA, "attention_type", "nabla"),
    Unsupported("Kandinsky6SRTransformer3DModel", _NABLA),
    Unsupported("QwenImageTransformer2DModel", _SEVERAL, "use_layer3d_rope", True),
    Unsupported("QwenImageLayeredPipeline", _SEVERAL),
    Unsupported("QwenImageLayeredModularPipeline", _SEVERAL),
    Unsupported("VisualClozePipeline", _EXAMPLES),
    Unsupported("VisualClozeGenerationPipeline", _EXAMPLES),
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
    Unsupported("Flux2KleinKVPipeline", _REFERENCE_CACHE),
    Unsupported("Flux2KVAttnProcessor", _REFERENCE_CACHE),
    Unsupported("Flux2KVParallelSelfAttnProcessor", _REFERENCE_CACHE),
]


def check_supported(target: Any) -> None:
    """Raise `ValueError` for a pipeline, model or processor that is known to be impossible."""
    names = [cls.__name__ for cls in type(target).__mro__]
    for entry in UNSUPPORTED:
        if entry.name in names and (entry.option is None or _option(target, entry.option) == entry.value):
            raise ValueError(
                f"the attention of {type(target).__name__} can't be swapped: {entry.reason}; run it as it is"
            )


def check_processor(processor: Any) -> None:
    """As `check_supported`, and for processors that attend by a call of their own and in a helper function as well."""
    check_supported(processor)
    helper = _attending_helper(type(processor).__call__)
    if helper is not None:
        raise ValueError(
            f"the attention of {type(processor).__name__} can't be swapped: part of it is computed in "
            f"{helper}(), out of reach; leave its layers out by layers="
        )


def _option(target: Any, name: str) -> Any:
    config = getattr(target, "config", None)
    return config.get(name) if isinstance(config, dict) else getattr(config, name, None)


def _attending_helper(function: Any) -> str | None:
    """Name of a global function that `function` calls, directly or through others, and that asks for attention."""
    seen: set[types.FunctionType] = set()
    waiting = _helpers(function)
    while waiting:
        name, helper = waiting.pop()
        if helper in seen:
            continue
        seen.add(helper)
        if _attends(helper):
            return name
        waiting += [(name, inner) for _, inner in _helpers(helper)]
    return None


def _helpers(function: Any) -> list[tuple[str, types.FunctionType]]:
    """Global functions of the module of `function` that it names."""
    if not isinstance(function, types.FunctionType):
        return []
    found = ((name, function.__globals__.get(name)) for name in sorted(_names(function.__code__)))
    return [
        (name, value)
        for name, value in found
        if isinstance(value, types.FunctionType) and value.__globals__ is function.__globals__
    ]


def _attends(function: types.FunctionType) -> bool:
    return bool({DISPATCH, SDPA} & _names(function.__code__))


def _names(code: types.CodeType) -> set[str]:
    """Every global and attribute that the code names, inner functions included."""
    names = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            names |= _names(constant)
    return names
