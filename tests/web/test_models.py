"""What a model of the page draws, and how it is left."""

import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline

import diffattn
from diffattn import ClearAttention, LinearAttention, RoutingAttention, tiny
from diffattn.comparison import Setting
from diffattn.web.jobs import Cancelled, Job
from diffattn.web.models import Model, Pair, Wish, draw_pair, see

WISH = Wish(prompt="a red circle", seed=3, height=64, width=64, steps=3)
SETTINGS = [Setting("full"), Setting.parse("clear radius=2")]


@pytest.fixture(scope="module")
def model() -> Iterator[Model]:
    model = Model("tiny", FluxPipeline.from_pretrained(tiny.path("flux")), tiny.defaults("flux"))
    yield model
    model.queue.close()


def own(model: Model, wish: Wish = WISH) -> np.ndarray:
    """By the model's own attention, without the page."""
    call = {**model.native, "height": wish.height, "width": wish.width, "num_inference_steps": wish.steps}
    generator = torch.Generator().manual_seed(wish.seed)
    return np.asarray(model.pipe(wish.prompt, generator=generator, output_type="np", **call).images[0])


def drawn(model: Model, *settings: Setting) -> Pair:
    pair: Pair = model.queue.submit(lambda job: draw_pair(model, WISH, settings or SETTINGS, job)).result()
    return pair


def test_a_pair_is_what_the_library_draws_and_the_model_is_as_before(model: Model) -> None:
    before, pair = own(model), drawn(model)
    np.testing.assert_array_equal(pair.drawn[0].pixels, before)
    with diffattn.apply(model.pipe, "clear", radius=2):
        np.testing.assert_array_equal(pair.drawn[1].pixels, own(model))
    np.testing.assert_array_equal(own(model), before)
    assert pair.drawn[0].computed == 1 and 0 < pair.drawn[1].computed < 1
    assert pair.mean == diffattn.measure.psnr(pair.drawn[1].pixels, pair.drawn[0].pixels) < 60


def test_equal_settings_are_identical(model: Model) -> None:
    assert drawn(model, SETTINGS[0], SETTINGS[0]).mean == float("inf")


@pytest.mark.parametrize("setting", [0, 1])
def test_cancelling_between_two_steps_leaves_the_model_as_it_was(
    model: Model, setting: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = own(model)
    drawn(model)  # warm
    told: list[str] = []

    def tick(job: Job, step: int) -> None:
        job.step = step
        told.append(f"{job.what} {step}")
        if job.what.startswith(f"drawing {'AB'[setting]}"):
            job.cancel()
        job.check()

    monkeypatch.setattr(Job, "tick", tick)
    job = model.queue.submit(lambda job: draw_pair(model, WISH, SETTINGS, job))
    with pytest.raises(Cancelled):
        job.result()
    assert told[-1] == f"drawing {'AB'[setting]}: {SETTINGS[setting].name} 1"
    monkeypatch.undo()
    np.testing.assert_array_equal(own(model), before)


def test_an_error_while_it_draws_leaves_the_model_as_it_was(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    before = own(model)

    def full(job: Job, step: int) -> None:
        raise MemoryError("not enough memory")

    monkeypatch.setattr(Job, "tick", full)
    with pytest.raises(MemoryError):
        drawn(model)
    monkeypatch.undo()
    np.testing.assert_array_equal(own(model), before)


def test_two_visitors_at_once_get_each_their_own_image(model: Model) -> None:
    texts = ["clear radius=1", "clear radius=3", "routing share=0.8 tile=2 pool=2", "softmax"]
    alone = {text: drawn(model, SETTINGS[0], Setting.parse(text)).drawn[1].pixels for text in texts}
    several = list(alone.values())
    assert all((one != other).any() for i, one in enumerate(several) for other in several[:i])
    found: dict[str, Any] = {}

    def visit(text: str) -> None:
        found[text] = drawn(model, SETTINGS[0], Setting.parse(text)).drawn[1].pixels

    threads = [threading.Thread(target=visit, args=(text,)) for text in texts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for text in texts:
        np.testing.assert_array_equal(found[text], alone[text])


def test_progress_is_told_step_by_step(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[str, int, int]] = []
    tick = Job.tick
    monkeypatch.setattr(Job, "tick", lambda job, step: (tick(job, step), told.append((job.what[:9], step, job.steps))))
    drawn(model)
    drawing = [one for one in told if one[0].startswith("drawing")]  # before each, a warm-up where it is the first
    assert drawing == [(f"drawing {place}", step, 3) for place in "AB" for step in (1, 2, 3)]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"seed": -1}, "seed must be a whole number from 0"),
        ({"steps": 0}, "steps must be a whole number from 1 to 10000, got 0"),
        ({"height": 0}, "height must be"),
        ({"width": 1.5}, "width must be"),
        ({"seed": True}, "seed must be"),
    ],
)
def test_values_that_mean_nothing_are_refused(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Wish(prompt="", **values)


def test_what_the_pipeline_does_not_take_is_refused(model: Model) -> None:
    with pytest.raises(ValueError, match="takes no num_frames"):
        model.draws(Wish(prompt="", frames=3))
    with pytest.raises(ValueError, match="height of at least"):
        model.draws(Wish(prompt="", height=4))


def test_a_setting_that_the_model_cannot_carry_is_refused_before_anything_is_drawn(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Job, "tell", lambda *_: pytest.fail("something was drawn"))
    with pytest.raises(ValueError, match="matches none|no layer|nothing"):
        drawn(model, SETTINGS[0], Setting.parse("clear radius=2 layers=nowhere.*"))


def test_a_call_is_caught_and_what_its_queries_see(model: Model) -> None:
    layer, mechanism = model.layers[-1], RoutingAttention(share=0.8, tile=2, pool=2)
    seeing = model.queue.submit(lambda job: see(model, WISH, mechanism, layer, 1, job)).result()
    assert (seeing.caught.layer, seeing.caught.step) == (layer, 1)
    assert (seeing.caught.grid.height, seeing.caught.grid.width) == (8, 8)
    assert seeing.heads == model.heads
    look = seeing.caught.look(0, 4, 4, seeing.seen)
    assert 0 < look.keys.sum() < 64 and look.mass.sum() == pytest.approx(1)


@pytest.mark.parametrize(
    ("mechanism", "step", "words"),
    [
        (LinearAttention(), 0, "does not choose among keys"),
        (ClearAttention(radius=2), 3, "steps 0 to 2, got step 3"),
    ],
)
def test_what_cannot_be_seen_is_refused(model: Model, mechanism: Any, step: int, words: str) -> None:
    job = model.queue.submit(lambda job: see(model, WISH, mechanism, model.layers[0], step, job))
    with pytest.raises(ValueError, match=words):
        job.result()
