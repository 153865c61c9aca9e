"""Classes with attention for which there is no row, and why."""

from collections.abc import Mapping
from types import MappingProxyType

LINEAR = "its attention is linear already"
NO_GRID = "its tokens lie on no grid"
PART = "it is a part of other models: give the model that runs it"
OWN_SOFTMAX = "it computes its softmax by itself, without an attention processor"
IN_TURN = "it makes one token after the other"

REFUSED: Mapping[str, str] = MappingProxyType(
    {
        "SanaVideoTransformer3DModel": LINEAR,
        "SanaControlNetModel": LINEAR,
        "SanaWMTransformer3DModel": f"{LINEAR}, and the layers between have no attention processor",
        "PriorTransformer": f"{NO_GRID}: they are embeddings of a text and an image",
        "RFD4ProteinaTransformer": f"{NO_GRID}: they are residues of proteins",
        "MiniMaxMusic3RVQDepthDecoder": IN_TURN,
        "UNet1DModel": OWN_SOFTMAX,
        "T5FilmDecoder": OWN_SOFTMAX,
        "Transformer2DModel": PART,
        "TransformerTemporalModel": PART,
        "DreamLiteTransformer2DModel": f"{PART}, DreamLiteUNetModel",
        "MotionAdapter": f"{PART}, UNetMotionModel",
        "ControlNetXSAdapter": f"{PART}, UNetControlNetXSModel",
    }
)
"""Class name -> why there is no row."""
