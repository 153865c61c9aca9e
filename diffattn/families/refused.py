"""Classes with attention for which there is no row, and why."""

from collections.abc import Mapping
from types import MappingProxyType

AUTOENCODER = "it is an autoencoder: its attention is not a denoiser's, and runs once for an image, a clip or a sound"
AUTOENCODERS = (
    "AsymmetricAutoencoderKL",
    "AutoencoderKL",
    "AutoencoderKLAllegro",
    "AutoencoderKLCosmos",
    "AutoencoderKLFlux2",
    "AutoencoderKLHunyuanImage",
    "AutoencoderKLHunyuanImageRefiner",
    "AutoencoderKLHunyuanVideo",
    "AutoencoderKLHunyuanVideo15",
    "AutoencoderKLKVAEAudio",
    "AutoencoderKLLTX2Audio",
    "AutoencoderKLMiniMaxH3Audio",
    "AutoencoderKLMochi",
    "AutoencoderKLQwenImage",
    "AutoencoderKLQwenImage21",
    "AutoencoderKLTemporalDecoder",
    "AutoencoderKLWan",
    "AutoencoderSAME",
    "AutoencoderVidTok",
    "ConsistencyDecoderVAE",
    "MMAudioVAE",
    "VQModel",
)
"""Those whose attention is in one block or two, or over audio."""

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
        **dict.fromkeys(AUTOENCODERS, AUTOENCODER),
        "AutoencoderDC": LINEAR,
        "AutoencoderKLMiniMaxH3": "it decodes tiles of 256 x 256 px and 7 latent frames: too few tokens for a gain",
        "AutoencoderRAE": "its images have a few hundred tokens, too few for a gain",
        "RFD4ProteinaAutoencoder": f"{NO_GRID}: they are residues of proteins",
        "AnimaTextConditioner": f"{NO_GRID}: they are words",
    }
)
"""Class name -> why there is no row."""
