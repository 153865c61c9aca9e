"""What a swap would gain: counted work against hand-made sums, every kind of inputs, and what is told."""

import inspect
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import pytest
import tiny_pipelines
import torch
from models import BUILDERS
from torch.nn import functional as F

import diffattn
from diffattn import ClearAttention, RoutingAttention, SoftmaxAttention, TokenGrid, estimate, tiny
from diffattn.cli import main
from diffattn.measure.estimate.estimate import Steps, computed_shares
from diffattn.measure.estimate.inputs import KINDS, make_inputs
from diffattn.measure.estimate.work import work_of
from diffattn.measure.modelled import CARDS
from diffattn.mechanisms.base import Mechanism
from diffattn.swap.settings.placement import Placement
from diffattn.swap.settings.schedule import FULL, Part, Schedule

ROUTING = RoutingAttention(share=0.5, tile=2, pool=2)
DOCUMENT = Path(__file__).parents[2] / "docs" / "tuning.md"
META = torch.empty(0, device="meta")


def bundled(name: str) -> Any:
    config = json.loads((tiny.path(name) / "transformer" / "config.json").read_text())
    return getattr(diffusers, config["_class_name"]).from_config(config).to("meta")


@pytest.mark.parametrize("name", [name for name in BUILDERS if type(BUILDERS[name]().model).__name__ in KINDS])
def test_inputs_of_every_kind_run(name: str) -> None:
    model = BUILDERS[name]().model
    frames = (
        3 if "num_frames" in inspect.signature(type(model).forward).parameters or "3D" in type(model).__name__ else 1
    )
    grid = TokenGrid(8, 8, frames, before=7 if KINDS[type(model).__name__].joint else 0)
    with torch.no_grad():
        out = model(**make_inputs(model, grid, 7, 2, torch.empty(0)))[0]
    assert len(out) in (2, 2 * frames) and torch.isfinite(out).all()
    work = work_of(model, Schedule.always(SoftmaxAttention()), grid, 7)
    assert work.attention > 0 and work.rest > 0


def test_the_work_of_flux_by_hand() -> None:
    model = bundled("flux")
    grid = TokenGrid(16, 24, before=32)
    work = work_of(model, Schedule.always(ClearAttention(radius=2)), grid, 32)
    layers, width, n = 6, 160, 16 * 24 + 32
    assert work.attention == layers * 4 * n**2 * width
    assert sum(work.calls.values()) == layers
    linear = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear))
    assert 0.5 * 2 * linear * n < work.rest < 2 * linear * n  # modulations see one token, a stream its own


def test_layers_that_are_left_out_are_of_the_rest() -> None:
    model, grid = bundled("flux"), TokenGrid(16, 16, before=32)
    every = work_of(model, Schedule.always(ROUTING), grid, 32)
    some = work_of(model, Schedule.always(ROUTING), grid, 32, "single_*")
    assert some.attention == every.attention * 4 // 6
    assert some.rest + some.attention == every.rest + every.attention


@pytest.mark.parametrize(
    ("reuse", "options", "steps", "want"),
    [
        (1, {}, 10, {"own": 1.0}),
        (2, {}, 10, {"own": 0.6}),  # 0, 2, 4, 6, 8 and the last
        (3, {}, 7, {"own": 3 / 7}),
        (1, {"start": 0.2}, 10, {"own": 0.8, "full": 0.2}),
        (2, {"start": 0.5}, 10, {"own": 0.3, "full": 0.5}),
        (1, {"start": 0.5}, (4, 4), {"own": 1.0}),  # image to image begins in the middle
        (1, {"start": 0.75}, (4, 4), {"own": 0.5, "full": 0.5}),
    ],
)
def test_steps_that_are_computed(reuse: int, options: dict[str, Any], steps: Any, want: dict[str, float]) -> None:
    schedule = Schedule.always(ROUTING, reuse)
    found = computed_shares(schedule, Placement(**options), Steps(*steps) if isinstance(steps, tuple) else Steps(steps))
    assert {"full" if part == Part(FULL) else "own": share for part, share in found.items()} == pytest.approx(want)


@pytest.mark.parametrize(
    ("row", "name", "options", "batch", "steps", "size"),
    [
        ("FLUX.1-dev, 2048 x 2048", "FluxTransformer2DModel", {"guidance_embeds": True}, 1, 28, (2048, 2048, 1)),
        ("LTX-Video, 704 x 512, 161 frames", "LTXVideoTransformer3DModel", {}, 2, 40, (512, 704, 161)),
        ("Wan 2.2 A14B, 832 x 480, 81 frames", "WanTransformer3DModel", {}, 2, 40, (480, 832, 81)),
    ],
)
@pytest.mark.slow
def test_the_modelled_table_of_the_documents(
    row: str, name: str, options: dict[str, Any], batch: int, steps: int, size: tuple[int, int, int]
) -> None:
    with torch.device("meta"):
        model = getattr(diffusers, name)(**options).to(torch.bfloat16)
    height, width, frames = size
    cells = []
    for quality in ("high", "balanced", "fast"):
        call = {"height": height, "width": width, "frames": frames, "batch": batch, "num_inference_steps": steps}
        [found] = estimate(model, "routing", quality=quality, card="H100", **call)
        cells.append(f"{found.speedup:.2f}x")
    tokens = str(found.grid).replace("x", " x ")
    assert f"| {row} | {tokens} | {found.attention:.0%} | {' | '.join(cells)} |" in DOCUMENT.read_text()


def test_a_card_is_modelled_and_labelled() -> None:
    [found] = estimate(bundled("flux"), "routing", share=0.2, height=1024, width=1024, text_tokens=32, card="h100")
    assert found.source == "modelled from the data sheet of H100, not measured"
    assert found.grid == TokenGrid(128, 128, before=32) and 0.15 < found.computed < 0.25
    assert found.attention == pytest.approx(0.944, abs=0.01)
    slow = [
        estimate(bundled("flux"), "clear", radius=4, height=512, width=512, card=card)[0].seconds_full for card in CARDS
    ]
    assert slow == sorted(slow, key=lambda seconds: -seconds) or len(set(slow)) == len(CARDS)


def test_what_changes_from_step_to_step_counts_as_halfway() -> None:
    own: dict[str, Any] = {"height": 48, "width": 48, "frames": 33, "text_tokens": 16, "card": "H100"}
    options = {"padding": 0, "top_k": 2, "global_phase": None}
    [still] = estimate(bundled("wan"), "dual_scope", local_phase=None, **options, **own)
    [moving] = estimate(bundled("wan"), "dual_scope", local_phase=None, rotation=1.0, **options, **own)
    assert moving.computed == still.computed < 0.5


def test_means_beside_a_window_are_in_the_modelled_time() -> None:
    own: dict[str, Any] = {"height": 1024, "width": 1024, "text_tokens": 32, "card": "H100"}
    [few], [many] = (estimate(bundled("flux"), "global_context", window=8, size=size, **own) for size in (1, 32))
    assert many.seconds > 1.1 * few.seconds


def test_a_small_size_gains_nothing_and_says_from_which_it_does() -> None:
    own: dict[str, Any] = {"card": "H100", "text_tokens": 32}
    [small] = estimate(bundled("flux"), "routing", top_share=0.1, chosen_by="mean", height=128, width=128, **own)
    assert not small.pays and "nothing is gained at this size" in str(small)
    assert small.pays_from is not None and small.pays_from > 256
    side = 8 * round(small.pays_from**0.5 / 8 + 1) * 8
    [large] = estimate(bundled("flux"), "routing", top_share=0.1, chosen_by="mean", height=side, width=side, **own)
    assert large.pays


def test_this_machine_is_measured_and_the_pipeline_left_as_it_was() -> None:
    pipe = diffusers.FluxPipeline.from_pretrained(tiny.path("flux"))
    diffattn.apply(pipe, "clear", radius=3)
    [found] = estimate(pipe, "routing", share=0.5, height=64, width=64, reuse=2, num_inference_steps=4, text_tokens=16)
    assert found.source.startswith("measured on ") and found.seconds_full > 0 and found.seconds > 0
    assert found.kept == 6 * (64 + 16) * 160 * 4 and found.weights == 4 * 3571856
    assert found.batch == 1 and found.computed == pytest.approx(0.75)  # at 8 x 8 tokens all tiles are its own
    assert "clear(radius=3)" in str(diffattn.summary(pipe))


@pytest.mark.parametrize("phase", [{"local_phase": (600, 0, -5)}, {"local_phase": (0.4, 0, -5), "phase_by": "sigma"}])
def test_phases_are_measured_as_halfway(phase: dict[str, Any]) -> None:
    options = {"padding": 0, "top_k": 2, "global_phase": None}
    pipe = diffusers.WanPipeline.from_pretrained(tiny.path("wan"))
    [found] = estimate(pipe, "dual_scope", height=48, width=48, frames=33, text_tokens=16, **options, **phase)
    assert found.computed < 1 and found.seconds > 0


def test_batches_take_as_much_longer() -> None:
    one, two = (
        estimate(bundled("wan"), "clear", radius=3, height=96, width=96, frames=33, batch=batch, card="A100")[0]
        for batch in (1, 2)
    )
    assert two.seconds == pytest.approx(2 * one.seconds) and two.speedup == pytest.approx(one.speedup)
    assert one.grid.shape == (9, 12, 12)  # a model by itself has the usual VAE of its class


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"card": "H1000"}, "card= of A100"),
        ({}, "a model with weights"),
        ({"card": "H100", "height": 100}, "does not divide"),
        ({"card": "H100", "radius": 0}, "radius"),
    ],
)
def test_wrong_arguments_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        estimate(bundled("flux"), "clear", **{"height": 128, "width": 128, "radius": 2, **options})


def test_a_class_without_a_row_is_named() -> None:
    model = BUILDERS["Lumina2"]().model
    with pytest.raises(ValueError, match="whose inputs are known, one of Flux.*got Lumina2Transformer2DModel"):
        estimate(model, "clear", radius=2, height=64, width=64)


def test_the_command_models_and_writes(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    size = ["--height", "96", "--width", "96", "--frames", "33"]
    swap = ["--mechanism", "clear", "-o", "radius=4", "--card", "H100", "--output", str(tmp_path / "a.json")]
    with pytest.raises(SystemExit, match="0"):
        main(["estimate", "tiny:wan", *swap, *size])
    text = capsys.readouterr().out
    assert "9x24x24 tokens" in text and "modelled from the data sheet of H100" in text
    assert json.loads((tmp_path / "a.json").read_text())[0]["grid"] == "9x24x24"


def test_a_mechanism_that_does_not_count_is_not_weighed() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Bare(Mechanism):
        type = "bare"

        def attend(self, q: Any, k: Any, v: Any, grid: Any, **options: Any) -> Any:
            return F.scaled_dot_product_attention(q, k, v)

    case = tiny_pipelines.flux(steps=1)
    with diffattn.apply(case.pipe, Bare()):
        assert torch.isfinite(case.run()).all()


def test_a_swap_that_gains_nothing_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    case = tiny_pipelines.flux(steps=2)
    with diffattn.apply(case.pipe, "clear", radius=2):
        case.run()
        case.run()
        summary = diffattn.summary(case.pipe)
    assert caplog.text.count("at 29 tokens attention is") == 1
    worth = summary.worth["FluxTransformer2DModel"]
    assert worth.tokens == 29 and 1 < worth.bound < 1.1 and "at most 1.0" in str(summary)
