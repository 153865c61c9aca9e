"""Texts and their embeddings."""

from typing import Any

import torch
from diffattn.pipelines.pixel_aware_sr.prompts import compose
from torch import Tensor

PROMPT = "a good video"
QUALITY = "sharp focus, rich natural texture, clean fine detail, crisp edges, smooth steady motion, true colors, 4k"
"""Follows every prompt."""
NEGATIVE = (
    "out of focus, motion blur, compression blocks, ringing, noise, flicker, washed-out colors, smeared texture, "
    "plastic skin, deformed anatomy, painting, cartoon, watermark, low resolution"
)


def with_quality(prompt: str) -> str:
    """The prompt and the quality prompt.

    >>> with_quality("boats").startswith("boats, sharp focus")
    True
    """
    return compose(prompt, quality=QUALITY)


def embed_text(text_encoder: Any, tokenizer: Any, text: str, device: torch.device) -> Tensor:
    """The text encoder's last hidden states (1, tokens, width), behind its final norm; long texts are cut.

    Padding is not masked, as in training.
    """
    tokens = tokenizer(
        [text], padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt"
    )
    hidden: Tensor = text_encoder(tokens.input_ids.to(device))[0]
    return hidden
