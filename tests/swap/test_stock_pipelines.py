"""Stock pipelines that call a supported model in a way of their own: the window lies on what they make."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import diffusers
import models
import pytest
import text_pipelines
import torch
from diffusers.pipelines.ltx.pipeline_ltx_condition import LTXVideoCondition
from hand_masks import RADIUS, TOLERANCE, HandMask, error
from models import Tokens, draw
from PIL import Image
from torch import Tensor, nn

import diffattn

ROWS, COLUMNS = 3, 5
"""Of an LTX latent frame: 96 x 160 pixels."""
CELLS = ROWS * COLUMNS
LTX_LAYERS = r"transformer_blocks\.\d+\.attn1"


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small spend nearly all their time waiting for a second thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def ltx_vae() -> Any:
    vae = diffusers.AutoencoderKLLTXVideo(
        latent_channels=4,
        block_out_channels=(4,) * 4,
        decoder_block_out_channels=(4,) * 4,
        layers_per_block=(1,) * 5,
        decoder_layers_per_block=(1,) * 5,
    )
    return models.randomize(vae)


@contextlib.contextmanager
def masks_by_call(model: nn.Module, layouts: dict[int, Tokens]) -> Iterator[list[int]]:
    """Hand-made masks for each call of the model by its number of tokens; gives the numbers that came."""
    own, seen = model.forward, []

    def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        seen.append(hidden_states.shape[1])
        with HandMask(model, {LTX_LAYERS: (layouts[seen[-1]],)}):
            return own(hidden_states, *args, **kwargs)

    model.forward = forward  # type: ignore[method-assign]
    try:
        yield seen
    finally:
        del model.forward


def check(pipe: Any, run: Callable[[], Tensor], layouts: dict[int, Tokens]) -> None:
    """A swapped run is the run under masks made by hand, and every layout is used."""
    own = run()
    with masks_by_call(pipe.transformer, layouts) as seen:
        want = run()
    assert set(seen) == set(layouts)
    assert error(want, own) > 1e-3, "the mask changes nothing: the test proves nothing"
    with diffattn.apply(pipe, "clear", radius=RADIUS):
        assert error(run(), want) < TOLERANCE
    with diffattn.apply(pipe, "softmax"):
        assert torch.equal(run(), own)
    assert torch.equal(run(), own)


@pytest.fixture(scope="module")
def ltx_condition() -> Any:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    pipe = diffusers.LTXConditionPipeline(scheduler, ltx_vae(), None, None, models.ltx().model)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def picture(shade: int) -> Image.Image:
    return Image.new("RGB", (160, 96), (shade, 255 - shade, 128))


CONDITIONS: dict[str, tuple[Callable[[], list[LTXVideoCondition]], int]] = {
    "text alone": (lambda: [], 0),
    "the first frame": (lambda: [LTXVideoCondition(image=picture(10))], 0),
    "a later frame": (lambda: [LTXVideoCondition(image=picture(10), frame_index=16)], 1),
    "two at one frame": (lambda: [LTXVideoCondition(image=picture(s), frame_index=8) for s in (10, 200)], 2),
    "the first and the last": (lambda: [LTXVideoCondition(image=picture(9), frame_index=i) for i in (0, 16)], 1),
    "more frames than the video has": (
        lambda: [LTXVideoCondition(image=picture(s), frame_index=8 * s) for s in (1, 2, 3, 4)],
        4,
    ),
    "a video": (lambda: [LTXVideoCondition(video=[picture(s) for s in range(9)], frame_index=8)], 2),
}


@pytest.mark.parametrize("conditions", CONDITIONS)
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_ltx_with_conditions(ltx_condition: Any, conditions: str, guidance: float) -> None:
    """Conditions beside the first frame are tokens before the video: everything sees them, and they everything."""
    make, frames = CONDITIONS[conditions]

    def run() -> Tensor:
        latents: Tensor = ltx_condition(
            conditions=make() or None,
            prompt_embeds=draw(1, models.TEXT, 12),
            prompt_attention_mask=torch.ones(1, models.TEXT),
            negative_prompt_embeds=torch.zeros(1, models.TEXT, 12),
            negative_prompt_attention_mask=torch.ones(1, models.TEXT),
            height=32 * ROWS,
            width=32 * COLUMNS,
            num_frames=17,
            num_inference_steps=2,
            guidance_scale=guidance,
            generator=torch.Generator().manual_seed(0),
            output_type="latent",
            return_dict=False,
        )[0]
        return latents.flatten()

    layout = Tokens(frames * CELLS, 3, ROWS, COLUMNS)
    check(ltx_condition, run, {layout.total: layout})


@pytest.fixture(scope="module")
def ltx_long() -> Any:
    scheduler = diffusers.LTXEulerAncestralRFScheduler()
    encoder, tokenizer = text_pipelines.t5(12), text_pipelines.tokenizer("t5")
    pipe = diffusers.LTXI2VLongMultiPromptPipeline(scheduler, ltx_vae(), encoder, tokenizer, models.ltx().model)
    pipe.set_progress_bar_config(disable=True)
    return pipe


LONG: dict[str, tuple[dict[str, Any], list[Tokens]]] = {
    # arguments of a call, and the layouts of its windows
    "one window": ({"num_frames": 17}, [Tokens(0, 3, ROWS, COLUMNS)]),
    "two windows": ({"num_frames": 33}, [Tokens(0, 3, ROWS, COLUMNS), Tokens(0, 3, ROWS, COLUMNS, CELLS)]),
    "from an image": (
        # kept as a negative frame as well
        {"num_frames": 17, "cond_image": picture(40), "guidance_scale": 3.0},
        [Tokens(0, 3, ROWS, COLUMNS, CELLS)],
    ),
    "with negative frames": (
        {"num_frames": 33, "negative_index_latents": draw(1, 4, 1, ROWS, COLUMNS)},
        [Tokens(0, 3, ROWS, COLUMNS, CELLS), Tokens(0, 3, ROWS, COLUMNS, 2 * CELLS)],
    ),
    "guided": (
        {"num_frames": 33, "guidance_latents": draw(1, 4, 5, ROWS, COLUMNS)},
        [Tokens(0, 3, ROWS, COLUMNS, 3 * CELLS)],
    ),
}


@pytest.mark.parametrize("call", LONG)
def test_long_ltx_videos(ltx_long: Any, call: str) -> None:
    """The pipeline says num_frames=height=width=1; frames carried over lie behind those that are made."""
    arguments, layouts = LONG[call]

    def run() -> Tensor:
        latents: Tensor = ltx_long(
            prompt="a red square | a blue disc",
            height=32 * ROWS,
            width=32 * COLUMNS,
            temporal_tile_size=24,
            temporal_overlap=8,
            num_inference_steps=3,
            max_sequence_length=6,
            return_dict=False,
            **arguments,
        )[0]
        return latents.flatten()

    check(ltx_long, run, {layout.total: layout for layout in layouts})


@torch.no_grad()
def test_more_tokens_than_ltx_was_called_for() -> None:
    """What came silently dense: there is no text among the cells that a surplus could be."""
    tiny = models.ltx()
    diffattn.apply(tiny.model, "clear", radius=RADIUS)
    tokens = torch.randn(2, 15, 4)
    with pytest.raises(ValueError, match=r"sees 60 tokens, but .* 1 x 1 x 1 = 1 cells and no other tokens"):
        tiny.run(num_frames=1, height=1, width=1, rope_interpolation_scale=None, video_coords=None)
    coordinates = torch.stack([torch.zeros(15), *(axis.float() for axis in models_ids(3, 5))])[None]
    tiny.run(hidden_states=tokens, video_coords=coordinates, num_frames=1, height=1, width=1)
    with pytest.raises(ValueError, match="video_coords must list a video .* got 14 tokens with 1 x 3 x 5 different"):
        tiny.run(hidden_states=tokens[:, 1:], video_coords=coordinates[..., 1:])


def models_ids(rows: int, columns: int) -> tuple[Tensor, Tensor]:
    return torch.arange(rows).repeat_interleave(columns), torch.arange(columns).repeat(rows)
