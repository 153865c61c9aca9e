"""Other kinds of calls of the same models, and those that are refused by what they are."""

import inspect
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from further.calls import CALLS, CELLS
from hand_masks import RADIUS, TOLERANCE, by_hand, error
from models import BUILDERS, Tiny, Tokens, draw
from releases import built, needs_class

import diffattn
from diffattn.families import arguments, family_of


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small spend nearly all their time waiting for a second thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def build(name: str) -> Tiny:
    """A release that lacks an argument of the call makes no such call."""
    tiny = CALLS[name][1]()
    lacking = tiny.inputs.keys() - inspect.signature(type(tiny.model).forward).parameters.keys()
    if lacking:
        pytest.skip(f"this diffusers has no {', '.join(sorted(lacking))} in {type(tiny.model).__name__}")
    return tiny


calls = pytest.mark.parametrize("name", [pytest.param(name, marks=needs_class(CALLS[name][0])) for name in CALLS])


@torch.no_grad()
@calls
def test_clear_is_the_model_under_a_mask_made_by_hand(name: str) -> None:
    tiny = build(name)
    own, want = tiny.run(), by_hand(tiny, tiny.spatial)
    assert error(want, own) > 1e-3
    with diffattn.apply(tiny.model, "softmax") as handle:
        assert torch.equal(tiny.run(), own)
        assert all(layer.reached for layer in handle.layers)
    with diffattn.apply(tiny.model, "clear", radius=RADIUS):
        assert error(tiny.run(), want) < TOLERANCE
    assert torch.equal(tiny.run(), own)


@torch.no_grad()
def test_one_swap_for_calls_of_every_kind() -> None:
    """LTX-2: a grid and tokens behind it are those of each call."""
    names = [name for name in CALLS if CALLS[name][0] == "LTX-2"]
    cases = [build(name) for name in names]
    wanted = [by_hand(tiny, tiny.spatial) for tiny in cases]
    with diffattn.apply(cases[0].model, "clear", radius=RADIUS):
        for _ in range(2):
            for tiny, want in zip(cases, wanted, strict=True):
                assert error(tiny.run(cases[0].model), want) < TOLERANCE


@torch.no_grad()
def test_masks_of_single_queries_in_some_calls() -> None:
    """Only LTX-2's IC-LoRA brings them, so mechanisms with one mask for all queries find out in the call."""
    tiny = build("LTX-2, IC-LoRA")
    for mechanism in (diffattn.AgentAttention(num_agents=4), diffattn.LinearAttention()):
        with diffattn.apply(tiny.model, mechanism), pytest.raises(ValueError, match="mask"):
            tiny.run()


@torch.no_grad()
def test_earlier_frames_that_are_not_known() -> None:
    """A token too many is an error and no history."""
    tiny = BUILDERS["Helios"]()
    read = family_of(tiny.model).layers[0].read
    for changes, before in (
        ({}, 28),
        ({"indices_latents_history_mid": None}, 22),
        ({"latents_history_short": None}, 8),
    ):
        [layout] = read(tiny.model, arguments(tiny.model, (), {**tiny.inputs, **changes}))
        assert layout.grid(before + CELLS).before == before
        with pytest.raises(ValueError, match=f"sees {before + CELLS + 1} tokens"):
            layout.grid(before + CELLS + 1)


@torch.no_grad()
def test_coordinates_that_begin_with_no_video() -> None:
    tiny = build("LTX-2, keyframe slots")
    bounds = tiny.inputs["video_coords"]
    shuffled = bounds[:, :, torch.randperm(CELLS, generator=torch.Generator().manual_seed(0))]
    behind, total = bounds[:, :, CELLS:], bounds.shape[2]
    with diffattn.apply(tiny.model, "clear", radius=RADIUS):
        for wrong in (torch.cat([shuffled, behind], dim=2), bounds[:, [0, 2, 1]]):
            with pytest.raises(ValueError, match=f"video_coords must begin with a video, .* of their {total} tokens"):
                tiny.run(video_coords=wrong)
    without = {**tiny.inputs, "video_coords": None}
    with pytest.raises(ValueError, match="read from video_coords, or from num_frames, height and width"):
        family_of(tiny.model).layers[0].read(tiny.model, arguments(tiny.model, (), without))


@needs_class("Ideogram4")
@torch.no_grad()
def test_an_image_that_is_not_the_last() -> None:
    tiny = BUILDERS["Ideogram4"]()
    turned: dict[str, Any] = {
        name: value.roll(2, dims=1)
        for name, value in tiny.inputs.items()
        if isinstance(value, torch.Tensor) and value.ndim > 1
    }
    diffattn.apply(tiny.model, "clear", radius=RADIUS)
    with pytest.raises(ValueError, match="position_ids must list an image row by row at their end"):
        tiny.run(**turned)


@torch.no_grad()
@pytest.mark.parametrize("name", built(["Chroma", "Ideogram4", "HunyuanVideo-1.5", "LuminaNext"]))
def test_padding_of_each_sample(name: str) -> None:
    """What is padding is read at a cell of each sample by itself, one after the other and at once."""
    tiny = BUILDERS[name]()
    batched = {key: value for key, value in tiny.inputs.items() if isinstance(value, torch.Tensor) and len(value) == 2}
    with diffattn.apply(tiny.model, "clear", radius=RADIUS):
        both = tiny.run().view(2, -1)
        for i in range(2):
            alone = tiny.run(**{key: value[i : i + 1] for key, value in batched.items()})
            assert error(alone, both[i]) < TOLERANCE


@torch.no_grad()
@needs_class("Ideogram4")
def test_images_of_two_sizes_in_a_batch() -> None:
    """The smaller one's first cell is text or padding in the other sample."""
    tiny = BUILDERS["Ideogram4"]()
    small = BUILDERS["Ideogram4"]()
    ids, indicator, segments = (tiny.inputs[name].clone() for name in ("position_ids", "indicator", "segment_ids"))
    rows, columns, total = 5, 4, ids.shape[1]
    first = total - rows * columns
    ids[1, first:, 1] = torch.arange(rows).repeat_interleave(columns) + 100
    ids[1, first:, 2] = torch.arange(columns).repeat(rows) + 100
    indicator[1, :first], segments[1, :first] = 0, -1
    indicator[1, first - 3 : first], segments[1, first - 3 : first] = 3, 1
    small.inputs |= {"position_ids": ids, "indicator": indicator, "segment_ids": segments}
    small.spatial = {key: (own, Tokens(first, 1, rows, columns)) for key, (own,) in tiny.spatial.items()}
    want = by_hand(small, small.spatial)
    with diffattn.apply(small.model, "clear", radius=RADIUS):
        assert error(small.run(), want) < TOLERANCE


def test_history_is_cut_or_padded_to_whole_patches() -> None:
    """As FramePack does: the youngest frames are cut, the older ones padded."""
    tiny = BUILDERS["FramePack"]()
    inputs = tiny.inputs | {
        "hidden_states": draw(2, 4, 3, 8, 10),
        "latents_clean": draw(2, 4, 2, 7, 11),
        "latents_history_2x": draw(2, 4, 3, 7, 11),
        "latents_history_4x": draw(2, 4, 5, 7, 11),
    }
    [layout] = family_of(tiny.model).layers[0].read(tiny.model, arguments(tiny.model, (), inputs))
    assert layout.before == 2 * 3 * 5 + 2 * 2 * 3 + 2 * 1 * 2
    with torch.no_grad():
        sizes = [0 if x is None else x.shape[1] for x in tiny.model.clean_x_embedder(*(inputs[n] for n in EARLIER))]
    assert layout.before == sum(sizes)


EARLIER = ("latents_clean", "latents_history_2x", "latents_history_4x")
