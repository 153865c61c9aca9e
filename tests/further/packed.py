"""Models that pack text, references and what they make into one sequence."""

from typing import Any

import torch
from tiny_model import TEXT, Tiny, Tokens, _make, draw
from torch import Tensor

H3_LAYERS = r"transformer_blocks\.\d+\.attn"
TEXT_TAG, VIDEO_TAG, AUDIO_TAG = 1, 0, 2


def frames_at(times: list[float], rows: int, columns: int) -> Tensor:
    """Time, row and column of frames, in MiniMax-H3's units: the sides are 32 together, around the middle."""
    area = (rows * columns) ** 0.5
    down, across = (16 + 32 * (torch.arange(side).double() - side / 2) / area for side in (rows, columns))
    return torch.cartesian_prod(torch.tensor(times, dtype=torch.float64), down, across)


def sound_at(time: float, count: int) -> Tensor:
    """Audio has a time and lies at both ends of the columns."""
    ids = torch.zeros(2, count, 3, dtype=torch.float64)
    ids[..., 0] = time + torch.arange(count)
    ids[1, :, 2] = 30
    return ids.flatten(0, 1)


def words_at(count: int) -> Tensor:
    ids = torch.zeros(count, 3, dtype=torch.float64)
    ids[:, 0] = torch.arange(count)
    return ids


def pack(*parts: tuple[int, Tensor]) -> dict[str, Any]:
    """The arguments for a sequence of parts, each a tag and ids.

    What is made are the last part of video and the last of audio, each at its timestep; the others are clean.
    """
    tags = torch.cat([torch.full((len(ids),), tag) for tag, ids in parts])
    numbers = torch.cat([torch.full((len(ids),), number) for number, (_, ids) in enumerate(parts)])
    indices = {tag: torch.nonzero(tags == tag).flatten() for tag in (VIDEO_TAG, TEXT_TAG, AUDIO_TAG)}
    timesteps = torch.zeros_like(tags)
    for tag, own in ((VIDEO_TAG, 1), (AUDIO_TAG, 2)):
        timesteps[numbers == numbers[tags == tag].max()] = own
    return dict(
        timestep=torch.tensor([0.99, 0.3, 0.5]),
        timestep_indices=timesteps,
        token_tags=tags,
        position_ids=torch.cat([ids for _, ids in parts]),
        video_indices=indices[VIDEO_TAG],
        audio_indices=indices[AUDIO_TAG],
        text_indices=indices[TEXT_TAG],
        hidden_states=draw(2, len(indices[VIDEO_TAG]), 8),
        audio_hidden_states=draw(2, len(indices[AUDIO_TAG]), 3),
        encoder_hidden_states=draw(2, len(indices[TEXT_TAG]), 12),
    )


FRAMES = [TEXT + time * 5 / 3 for time in (0, 1, 5)]
"""Times of the video's: the first frame stands for one image, the others for four."""
VIDEO = (VIDEO_TAG, frames_at(FRAMES, 4, 5))
WORDS = (TEXT_TAG, words_at(TEXT))
SOUND = (AUDIO_TAG, sound_at(TEXT, 3))


def minimax_h3() -> Tiny:
    """Text, the video's last frame as a reference, audio, and the video."""
    inputs = pack(WORDS, (VIDEO_TAG, frames_at(FRAMES[-1:], 4, 5)), SOUND, VIDEO)
    return Tiny(_minimax_h3(), inputs, {H3_LAYERS: (Tokens(TEXT + 20 + 6, 3, 4, 5),)})


def minimax_h3_references() -> Tiny:
    """Text, an image, a sound and a video with sound as references, then audio and the video."""
    references = [
        (VIDEO_TAG, frames_at([5], 3, 4)),
        (AUDIO_TAG, sound_at(6, 2)),
        (AUDIO_TAG, sound_at(8, 2)),
        (VIDEO_TAG, frames_at([8, 8 + 5 / 3], 4, 5)),
    ]
    made = [(AUDIO_TAG, sound_at(18, 3)), (VIDEO_TAG, frames_at([time + 13 for time in FRAMES], 4, 5))]
    inputs = pack(WORDS, *references, *made)
    return Tiny(_minimax_h3(), inputs, {H3_LAYERS: (Tokens(TEXT + 12 + 4 + 4 + 40 + 6, 3, 4, 5),)})


def _minimax_h3() -> Any:
    return _make(
        "MiniMaxH3Transformer3DModel",
        num_attention_heads=2,
        attention_head_dim=16,
        hidden_size=24,
        num_layers=2,
        num_refiner_layers=1,
        ffn_dim=32,
        in_channels=2,
        audio_in_channels=3,
        text_dim=12,
        freq_dim=16,
        time_embed_hidden_dim=24,
        time_embed_dim=12,
        rope_freq_dim=2,
    )


def qwen_image21(images: int = 0) -> Tiny:
    """Text, then so many condition images of 2 x 4 tokens with text behind each, then the image that is made."""
    model = _make(
        "QwenImage21Transformer2DModel",
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        context_in_dim=12,
        axes_dims_rope=(4, 6, 6),
    )
    words = [False] * TEXT
    given = words + ([True] * 2 + words) * images
    mask = torch.tensor([given + [True] * 12] * 2)
    inputs = dict(
        hidden_states=draw(2, 8 * images + 48, 4),
        encoder_hidden_states=draw(2, len(given), 12),
        encoder_hidden_states_mask=(torch.arange(len(given)) < torch.tensor([[len(given)], [len(given) - 2]])),
        timestep=torch.tensor([0.7, 0.3]),
        img_shapes=[[(1, 2, 4)] * images + [(1, 6, 8)]] * 2,
        img_mask=mask,
    )
    before = TEXT + images * (8 + TEXT)
    return Tiny(
        model, inputs, {r"transformer_blocks\.\d+\.attn": (Tokens(before, 1, 6, 8, silent=(before, 0), apart=True),)}
    )


def qwen_image21_edit() -> Tiny:
    return qwen_image21(images=2)
