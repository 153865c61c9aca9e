"""Models that pack text, references and what they make into one sequence: where in it the grid lies."""

from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
from further.packed import (
    FRAMES,
    H3_LAYERS,
    SOUND,
    TEXT_TAG,
    VIDEO,
    VIDEO_TAG,
    WORDS,
    frames_at,
    minimax_h3,
    pack,
    qwen_image21,
    words_at,
)
from hand_masks import RADIUS, TOLERANCE, by_hand, error
from models import TEXT, Tiny, Tokens
from releases import needs
from torch import Tensor

import diffattn
from diffattn.families import Layout, arguments, family_of

pytestmark = needs("diffusers", "0.42", "models that pack their sequences")


def layout_of(tiny: Tiny, **changes: Any) -> Layout:
    read = family_of(tiny.model).layers[0].read
    [layout] = read(tiny.model, arguments(tiny.model, (), {**tiny.inputs, **changes}))
    return layout


def first_and_last_frame(anchors: tuple[str, ...]) -> dict[str, Any]:
    """What MiniMax-H3's own pipeline packs: latents of 4 x 10 x 12 in patches of 2 x 2, and 7 places of sound."""
    from diffusers.modular_pipelines.minimax_h3.before_denoise import MiniMaxH3PrepareLayoutStep

    build = MiniMaxH3PrepareLayoutStep.build_packed_sequence
    return with_timesteps(*build(torch.ones(TEXT), 4, 10, 12, 7, (1, 2, 2), 2, 2, 0, anchors))


def references(*kinds: str) -> dict[str, Any]:
    """The same with images, sounds and videos as references, of other sizes and of the video's own."""
    from diffusers.modular_pipelines.minimax_h3.before_denoise import MiniMaxH3Ref2VAPrepareLayoutStep

    shapes = {"image": (1, 8, 1, 6, 4), "own image": (1, 8, 1, 10, 12), "video": (1, 8, 3, 10, 12)}
    given: Any = [SimpleNamespace(kind=kind.split()[-1], has_audio=kind == "video") for kind in kinds]
    latents = [torch.zeros(shapes[kind]) for kind in kinds if kind in shapes]
    sounds = [torch.zeros(6, 3) for kind in kinds if kind in ("video", "audio")]
    build = MiniMaxH3Ref2VAPrepareLayoutStep.build_ref2va_packed_sequence
    return with_timesteps(*build(torch.ones(TEXT), given, latents, sounds, 4, 10, 12, 7, (1, 2, 2), 2, 2, 0))


def with_timesteps(
    ids: Tensor, tags: Tensor, video: Tensor, audio: Tensor, text: Tensor, videos_given: int, sounds_given: int
) -> dict[str, Any]:
    from diffusers.modular_pipelines.minimax_h3.before_denoise import MiniMaxH3SetTimestepsStep

    build = MiniMaxH3SetTimestepsStep.build_row_timesteps
    _, indices = build(video, audio, videos_given, sounds_given, len(text), 0.3, 0.5, 0.999, 1.0)
    return dict(position_ids=ids, video_indices=video, timestep_indices=indices)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("anchors", [(), ("first",), ("last",), ("first", "last")], ids=str)
def test_the_video_of_a_pipeline(anchors: tuple[str, ...], dtype: torch.dtype) -> None:
    call = first_and_last_frame(anchors)
    call["position_ids"] = call["position_ids"].to(dtype)
    assert layout_of(minimax_h3(), **call) == Layout(5, 6, 4, before=TEXT + 30 * len(anchors) + 14, after=0)


@pytest.mark.parametrize("times", [[-4, 0, 3], [0, 1, 5], [400, 402, 409]], ids=str)
def test_a_video_that_begins_at_any_time(times: list[float]) -> None:
    call = pack(WORDS, SOUND, (VIDEO_TAG, frames_at(times, 4, 5)))
    assert layout_of(minimax_h3(), **call) == Layout(4, 5, 3, before=TEXT + 6, after=0)


REFERENCES = {
    ("image",): 6,
    ("audio",): 6,
    ("own image",): 30,
    ("video",): 6 + 90,
    ("video", "own image"): 6 + 90 + 30,
    ("image", "audio", "own image", "video", "audio"): 6 + 6 + 30 + 6 + 90 + 6,
}


@pytest.mark.parametrize("kinds", REFERENCES, ids=str)
def test_the_video_behind_references(kinds: tuple[str, ...]) -> None:
    assert layout_of(minimax_h3(), **references(*kinds)) == Layout(5, 6, 4, TEXT + REFERENCES[kinds] + 14, 0)


@torch.no_grad()
def test_a_video_need_not_be_the_last() -> None:
    tiny = minimax_h3()
    call = pack((TEXT_TAG, words_at(3)), SOUND, VIDEO, (TEXT_TAG, words_at(2)))
    want = by_hand(tiny, {H3_LAYERS: (Tokens(3 + 6, 3, 4, 5, 2),)}, **call)
    with diffattn.apply(tiny.model, "clear", radius=RADIUS):
        assert error(tiny.run(**call), want) < TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize("time", [FRAMES[0] - 1, FRAMES[0], FRAMES[-1]])
def test_a_reference_beside_the_video_is_none_of_its_frames(time: float) -> None:
    """It has another timestep."""
    tiny = minimax_h3()
    call = pack(WORDS, SOUND, (VIDEO_TAG, frames_at([time], 4, 5)), VIDEO)
    want = by_hand(tiny, {H3_LAYERS: (Tokens(TEXT + 6 + 20, 3, 4, 5),)}, **call)
    with diffattn.apply(tiny.model, "clear", radius=RADIUS):
        assert error(tiny.run(**call), want) < TOLERANCE


def wrong_videos() -> dict[str, dict[str, Any]]:
    """Calls whose tokens of video are no video, or lie apart."""
    ids = VIDEO[1]
    tokens = {
        "column by column": ids.view(3, 4, 5, 3).transpose(1, 2).reshape(60, 3),
        "a token short": ids[:-1],
        "a token behind the first": ids[1:],
        "backwards in time": ids.view(3, 20, 3).flip(0).reshape(60, 3),
        "another video behind it": torch.cat([ids, ids]),
        "two frames at one time": frames_at([FRAMES[0], FRAMES[1], FRAMES[1]], 4, 5),
        "a frame of another size": torch.cat([ids, frames_at([20], 3, 4)]),
    }
    calls = {name: pack(WORDS, SOUND, (VIDEO_TAG, own)) for name, own in tokens.items()}
    backwards, none = pack(WORDS, SOUND, VIDEO), pack(WORDS, SOUND, VIDEO)
    backwards["video_indices"] = backwards["video_indices"].flip(0)
    none.update(video_indices=none["video_indices"][:0], hidden_states=none["hidden_states"][:, :0])
    apart = pack(WORDS, (VIDEO_TAG, ids[:40]), SOUND, (VIDEO_TAG, ids[40:]))
    apart["timestep_indices"] = torch.where(apart["token_tags"] == VIDEO_TAG, 1, apart["timestep_indices"])
    return {**calls, "their order": backwards, "none": none, "sound among the frames": apart}


@torch.no_grad()
@pytest.mark.parametrize("wrong", wrong_videos())
def test_what_is_no_video_is_refused_at_the_call(wrong: str) -> None:
    tiny, call = minimax_h3(), wrong_videos()[wrong]
    dense = tiny.run(**call)
    with diffattn.apply(tiny.model, "clear", radius=RADIUS):
        with pytest.raises(ValueError, match="of the last one must lie side by side and be one video by position_ids"):
            tiny.run(**call)
        assert tiny.run().isfinite().all()
    with diffattn.apply(tiny.model, "softmax"):
        assert torch.equal(tiny.run(**call), dense)


class Parts:
    """A pipeline as far as its parts go."""

    def __init__(self, **parts: Any) -> None:
        self.components = parts


def test_both_transformers_of_its_pipeline() -> None:
    """The one that takes references is a part of its own."""
    one, other = minimax_h3().model, minimax_h3().model
    with diffattn.apply(Parts(transformer=one, transformer_ref=other), "clear", radius=RADIUS) as handle:
        assert len(handle.layers) == 4
    with diffattn.apply(Parts(transformer=None, transformer_ref=other), "clear", radius=RADIUS) as handle:
        assert len(handle.layers) == 2


def image_of(output: Tensor) -> Tensor:
    """Qwen-Image 2.1's, of the output for all tokens that ask."""
    return output.view(2, -1, 4)[:, -48:]


@torch.no_grad()
@pytest.mark.parametrize("images", [0, 1, 2])
def test_the_image_is_the_same_by_kept_keys(images: int) -> None:
    from diffusers.models.transformers.transformer_qwenimage21 import QwenImage21KVCache

    tiny = qwen_image21(images)
    dense, want = (image_of(output) for output in (tiny.run(), by_hand(tiny, tiny.spatial)))
    assert error(want, dense) > 1e-3

    def kept() -> list[Tensor]:
        cache = QwenImage21KVCache(2)
        return [image_of(tiny.run(kv_cache=cache, kv_cache_mode=mode)) for mode in ("extract", "cached")]

    own = kept()
    with diffattn.apply(tiny.model, "softmax"):
        assert all(map(torch.equal, kept(), own))
    with diffattn.apply(tiny.model, "clear", radius=RADIUS):
        for image in (image_of(tiny.run()), *kept()):
            assert error(image, want) < TOLERANCE


def test_one_call_for_the_whole_sequence_is_refused() -> None:
    from diffusers.models.transformers.transformer_qwenimage21 import QwenImage21FlexAttnProcessor

    model = qwen_image21().model
    model.transformer_blocks[1].attn.set_processor(QwenImage21FlexAttnProcessor())
    with pytest.raises(ValueError, match="QwenImage21FlexAttnProcessor can't be swapped: .* set QwenImage21AttnProc"):
        diffattn.apply(model, "clear", radius=RADIUS)
    with diffattn.apply(model, "clear", radius=RADIUS, layers="transformer_blocks.0.attn") as handle:
        assert len(handle.layers) == 1


@pytest.mark.parametrize("mode", [None, "extract", "cached"])
@pytest.mark.parametrize("images", [0, 1, 2])
def test_where_the_image_lies_among_the_keys(images: int, mode: str | None) -> None:
    tiny = qwen_image21(images)
    layout = layout_of(tiny, kv_cache_mode=mode)
    before = TEXT + images * (8 + TEXT)
    assert layout == Layout(6, 8, 1, before, 0, apart=True)
    grid = layout.grid(before + 48, queries=48)
    assert (grid.queries, grid.query_slice) == (48, slice(before, before + 48))


def test_an_image_that_is_not_the_last() -> None:
    tiny = qwen_image21(1)
    mask, wider = tiny.inputs["img_mask"], [[(1, 2, 4), (1, 6, 20)]] * 2
    for changes in ({"img_mask": mask.roll(1, dims=1)}, {"img_shapes": wider}, {"img_shapes": [[(1, 3, 3)]] * 2}):
        with pytest.raises(ValueError, match="img_mask must end with the .* places of the image that is made"):
            layout_of(tiny, **changes)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "Kandinsky6SRTransformer3DModel": (
        dict(in_visual_dim=2, out_visual_dim=2, time_dim=16, model_dim=32, ff_dim=32, num_visual_blocks=1)
        | dict(axes_dims=(4, 6, 6)),
        r"attends sparsely by itself \(NABLA\)",
    ),
    "AnyFlowFARTransformer3DModel": (
        dict(num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=8, freq_dim=16)
        | dict(ffn_dim=16, num_layers=1, rope_max_seq_len=32),
        "a few frames at a time.* block mask",
    ),
    "WanAnimate2Transformer3DModel": (
        dict(in_dim=8, dim=24, ffn_dim=16, freq_dim=16, text_dim=8, out_dim=4, num_heads=2, num_layers=1)
        | dict(use_img_emb=False),
        "block mask of its own",
    ),
    "SanaWMLTX2RefinerTransformer3DModel": (
        dict(in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, cross_attention_dim=32)
        | dict(audio_in_channels=4, audio_out_channels=4, audio_num_attention_heads=2, audio_attention_head_dim=8)
        | dict(audio_cross_attention_dim=16, num_layers=1, caption_channels=12),
        "a few frames at a time.* tells no grid",
    ),
}
"""Class -> config and reason."""


@pytest.mark.parametrize("mechanism", [diffattn.ClearAttention(radius=2), diffattn.SoftmaxAttention()], ids=str)
@pytest.mark.parametrize("name", REFUSED)
def test_what_no_reader_makes_right_is_refused(name: str, mechanism: Any) -> None:
    config, reason = REFUSED[name]
    model = getattr(diffusers, name)(**config)
    before = {key: module.processor for key, module in model.named_modules() if hasattr(module, "processor")}
    assert before
    with pytest.raises(ValueError, match=f"attention of {name} can't be swapped: .*{reason}"):
        diffattn.apply(model, mechanism)
    assert all(model.get_submodule(key).processor is own for key, own in before.items())
    assert not hasattr(model, "_diffattn")
