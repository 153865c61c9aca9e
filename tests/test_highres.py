"""Images larger than those of training: the stages, what they leave behind, and what is refused."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import stand_ins
import torch
import typer.testing
from PIL import Image

import diffattn
from diffattn import ClearAttention, SoftmaxAttention, generate_large, tiny
from diffattn.cli import app
from diffattn.highres import LargeResult, Stage, stage_sizes
from diffattn.measure import psnr
from diffattn.swap.apply import swaps_of

PROMPT = "a large red circle at the top left on a blue background"
TEXT = 32
CLEAR = ClearAttention(radius=4)
SMALL = {"size": (128, 128), "via": 64, "num_inference_steps": 2, "strength": 0.5}
"""One stage of one step."""


@pytest.fixture(scope="module")
def pipe() -> Any:
    loaded = stand_ins.flux()
    loaded.set_progress_bar_config(disable=True)
    return loaded


def large(pipe: Any, seed: int = 0, **changes: Any) -> LargeResult:
    generator = torch.Generator().manual_seed(seed)
    call = {"max_sequence_length": TEXT} if "transformer" in pipe.components else {}
    return generate_large(pipe, PROMPT, **{"generator": generator, "base_call": call, **SMALL, **changes})


def plain(pipe: Any, steps: int = 2, **size: int) -> np.ndarray:
    call = {**tiny.defaults("flux"), **size, "num_inference_steps": steps}
    return np.asarray(pipe(PROMPT, generator=torch.Generator().manual_seed(0), **call).images[0])


def state(pipe: Any) -> dict[str, Any]:
    """What a run could leave behind."""
    processors = {name: id(processor) for name, processor in pipe.transformer.attn_processors.items()}
    hooks = sum(len(module._forward_pre_hooks) + len(module._forward_hooks) for module in pipe.transformer.modules())
    theta, tiling = pipe.transformer.pos_embed.theta, pipe.vae.use_tiling
    return {"processors": processors, "hooks": hooks, "theta": theta, "tiling": tiling, "swaps": swaps_of(pipe)}


class Watch:
    """A `progress` that notes what `look` sees after each call, and keeps the images."""

    def __init__(self, look: Callable[[], Any] = lambda: None) -> None:
        self.look = look
        self.seen: list[Any] = []
        self.stages: list[Stage] = []
        self.pictures: list[Image.Image] = []

    def __call__(self, stage: Stage, picture: Image.Image) -> None:
        self.seen.append(self.look())
        self.stages.append(stage)
        self.pictures.append(picture)


@pytest.mark.parametrize(
    ("size", "via", "growth", "want"),
    [
        ((4096, 4096), 1024, 2.0, [(1024, 1024), (2048, 2048), (4096, 4096)]),
        ((4096, 4096), 1024, None, [(1024, 1024), (4096, 4096)]),
        ((4096, 4096), 1024, float("inf"), [(1024, 1024), (4096, 4096)]),
        ((2048, 4096), 1024, 4.0, [(512, 1024), (2048, 4096)]),
        ((8192, 1024), 1024, 2.0, [(1024, 128), (2048, 256), (4096, 512), (8192, 1024)]),
        ((2304, 2304), 1024, 2.0, [(1024, 1024), (1536, 1536), (2304, 2304)]),
        ((1040, 1040), 1024, 1.01, [(1024, 1024), (1040, 1040)]),
        ((16, 4096), 1024, None, [(16, 1024), (16, 4096)]),
        ((768, 1024), 1024, 2.0, [(768, 1024)]),
    ],
)
def test_stages_grow_by_equal_factors(
    size: tuple[int, int], via: int, growth: float | None, want: list[tuple[int, int]]
) -> None:
    assert stage_sizes(size, via, growth) == want


@pytest.mark.slow
def test_four_times_the_native_side_keeps_the_first_picture(pipe: Any) -> None:
    watch = Watch()
    mechanism = ClearAttention(radius=8)
    options = {"size": (512, 512), "via": 128, "num_inference_steps": 10, "strength": 0.1}
    result = large(pipe, mechanism=mechanism, progress=watch, **options)
    assert [stage.size for stage in result.stages] == [(128, 128), (256, 256), (512, 512)]
    assert [stage.steps for stage in result.stages] == [10, 1, 1]
    assert all(stage.seconds > 0 for stage in result.stages) and watch.stages == list(result.stages)
    assert result.picture.size == (512, 512) and result.picture is watch.pictures[-1]
    enlarged = watch.pictures[0].resize((512, 512), Image.Resampling.LANCZOS)
    direct = plain(pipe, height=512, width=512)
    assert psnr(result.picture, enlarged) > 22 > 18 > psnr(direct, enlarged)


def test_a_picture_that_is_not_square(pipe: Any) -> None:
    result = large(pipe, size=(256, 384), via=128, mechanism=CLEAR)
    assert [stage.size for stage in result.stages] == [(88, 128), (144, 224), (256, 384)]
    assert result.picture.size == (384, 256)


def test_growth_none_goes_there_at_once(pipe: Any) -> None:
    result = large(pipe, size=(192, 192), mechanism=CLEAR, growth=None)
    assert [stage.size for stage in result.stages] == [(64, 64), (192, 192)]


def test_the_first_picture_is_the_pipelines_own(pipe: Any) -> None:
    watch = Watch()
    large(pipe, mechanism=CLEAR, progress=watch)
    assert np.array_equal(watch.pictures[0], plain(pipe, height=64, width=64))
    result = large(pipe, size=(64, 64), mechanism=CLEAR)
    assert np.array_equal(result.picture, watch.pictures[0]) and len(result.stages) == 1


def test_same_seed_same_picture(pipe: Any) -> None:
    first, again, other, exact = (
        np.asarray(large(pipe, seed, mechanism=mechanism).picture)
        for seed, mechanism in ((3, CLEAR), (3, CLEAR), (4, CLEAR), (3, None))
    )
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other) and not np.array_equal(first, exact)


def test_the_first_call_may_differ_and_the_stages_take_the_rest(pipe: Any) -> None:
    text = pipe.transformer.context_embedder
    lengths: list[int] = []
    hook = text.register_forward_pre_hook(lambda module, args: lengths.append(args[0].shape[1]))
    result = large(pipe, base_call={"max_sequence_length": 20, "num_inference_steps": 3})
    hook.remove()
    assert [stage.steps for stage in result.stages] == [3, 1]
    assert lengths == [20] * 4


def test_guidance_of_the_first_picture_and_of_the_stages(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    for cls in (type(pipe), diffusers.FluxImg2ImgPipeline):
        encode = cls.encode_prompt
        monkeypatch.setattr(
            cls,
            "encode_prompt",
            lambda self, *a, _own=encode, **k: (seen.append(self.guidance_scale), _own(self, *a, **k))[1],
        )
    large(pipe, base_guidance_scale=3.5, guidance_scale=7.5)
    large(pipe)
    large(pipe, base_call={"max_sequence_length": TEXT, "guidance_scale": 1.0})
    assert seen == [3.5, 7.5, 3.5, 7.0, 1.0, 7.0]


def test_swap_rotary_base_and_tiles_are_those_of_the_stages_only(pipe: Any) -> None:
    before, picture = state(pipe), plain(pipe)
    watch = Watch(lambda: state(pipe))
    large(pipe, size=(192, 192), mechanism=ClearAttention(radius=4, ntk_factor=10), progress=watch)
    first, *stages = watch.seen
    assert first == before and first["theta"] == 10_000 and not first["tiling"]
    assert len(stages) == 2
    assert all(seen["theta"] == 100_000 and seen["tiling"] and seen["swaps"] for seen in stages)
    assert state(pipe) == before and np.array_equal(plain(pipe), picture)


def test_a_stage_that_raises_leaves_nothing_behind(pipe: Any) -> None:
    def stop(stage: Stage, picture: Image.Image) -> None:
        if stage.size == (128, 128):
            raise KeyboardInterrupt

    before, picture = state(pipe), plain(pipe)
    with pytest.raises(KeyboardInterrupt):
        large(pipe, mechanism=ClearAttention(radius=4, ntk_factor=10), progress=stop)
    assert state(pipe) == before and np.array_equal(plain(pipe), picture)


def test_tiles_stay_as_they_were(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    watch = Watch(lambda: pipe.vae.use_tiling)
    large(pipe, tiled_vae=False, progress=watch)
    assert watch.seen == [False, False]
    monkeypatch.setattr(pipe.vae, "use_tiling", True)
    large(pipe)
    assert pipe.vae.use_tiling


@pytest.mark.parametrize(
    ("mechanism", "want"),
    [
        (ClearAttention(radius=4, proportional=True), 5 * 8 + TEXT),
        (ClearAttention(radius=4, proportional=True, train_tokens=999), 999),
        (ClearAttention(radius=4, proportional=True, official=True), 4608),
        (ClearAttention(radius=4), 4608),
        (SoftmaxAttention(proportional=True), 5 * 8 + TEXT),
    ],
    ids=["set", "said by the user", "official", "not proportional", "full"],
)
def test_train_tokens_are_those_of_the_first_picture(pipe: Any, mechanism: Any, want: int) -> None:
    watch = Watch(lambda: [swap.mechanism.train_tokens for swap in swaps_of(pipe)])
    large(pipe, size=(80, 128), mechanism=mechanism, progress=watch)
    assert watch.seen == [[], [want]]


def test_text_of_given_embeddings_is_counted(pipe: Any) -> None:
    embeds, pooled, _ = pipe.encode_prompt(PROMPT, None, max_sequence_length=24)
    watch = Watch(lambda: [swap.mechanism.train_tokens for swap in swaps_of(pipe)])
    call = {"prompt_embeds": embeds.detach(), "pooled_prompt_embeds": pooled.detach()}
    options = {**SMALL, "mechanism": ClearAttention(radius=4, proportional=True), "progress": watch}
    generate_large(pipe, None, base_call=call, generator=torch.Generator(), **options)
    assert watch.seen == [[], [8 * 8 + 24]]


def test_options_of_apply_are_passed_on(pipe: Any) -> None:
    watch = Watch(lambda: [set(swap.layers) for swap in swaps_of(pipe)])
    large(pipe, mechanism=CLEAR, apply_options={"layers": "single_*.0.attn", "backend": "dense"}, progress=watch)
    assert watch.seen == [[], [{"single_transformer_blocks.0.attn"}]]


def test_a_swapped_pipeline_keeps_its_swap(pipe: Any) -> None:
    watch = Watch(lambda: [swap.mechanism for swap in swaps_of(pipe)])
    with diffattn.apply(pipe, CLEAR, steps=slice(1, None)):
        large(pipe, progress=watch)
        assert watch.seen == [[CLEAR], [CLEAR]] == [[swap.mechanism for swap in swaps_of(pipe)]] * 2
        with pytest.raises(ValueError, match="swapped already"):
            large(pipe, mechanism=CLEAR)
    assert not swaps_of(pipe)


def test_trained_weights_in_the_stages_alone(pipe: Any, tmp_path: Path) -> None:
    own, projection = plain(pipe), pipe.transformer.transformer_blocks[0].attn.to_q.weight
    kept = projection.detach().clone()
    with diffattn.apply(pipe, ClearAttention(radius=4, down_factor=2)):
        file = diffattn.save(pipe, tmp_path, include=["transformer_blocks.0.attn.to_q.weight"])
    with torch.no_grad():
        projection.mul_(0.5)
    watch = Watch(lambda: (torch.equal(projection, kept), [swap.mechanism for swap in swaps_of(pipe)]))
    try:
        large(pipe, mechanism=lambda target: diffattn.load(target, file, ntk_factor=10), progress=watch)
        assert watch.seen == [(False, []), (True, [ClearAttention(radius=4, down_factor=2, ntk_factor=10)])]
        assert torch.equal(projection, kept * 0.5) and not swaps_of(pipe)
    finally:
        projection.data.copy_(kept)
    assert np.array_equal(plain(pipe), own)


def test_a_unet_whose_pipeline_takes_its_size_from_the_picture() -> None:
    pipe = stand_ins.stable_diffusion()
    pipe.set_progress_bar_config(disable=True)
    pipe.unet.register_to_config(sample_size=64)  # its image-to-image pipeline cannot do without
    watch = Watch(lambda: [swap.mechanism for swap in swaps_of(pipe)])
    mechanism = ClearAttention(radius=3, proportional=True)
    result = large(pipe, size=(128, 192), via=96, mechanism=mechanism, progress=watch)
    assert result.picture.size == (192, 128) and watch.seen == [[], [mechanism]]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"size": (100, 128)}, "multiples of 8 pixels, got \\(100, 128\\)"),
        ({"size": (0, 128)}, "multiples of 8 pixels"),
        ({"via": 100}, "via must be a multiple of 8"),
        ({"via": 512}, "size=\\(128, 128\\) is smaller than via=512"),
        ({"strength": 0}, "strength must be above 0"),
        ({"strength": 1.1}, "at most 1, got 1.1"),
        ({"strength": float("nan")}, "strength must be above 0"),
        ({"strength": 0.4}, "leaves a stage no step"),
        ({"growth": 1.0}, "growth must be above 1"),
        ({"base_call": {"height": 64, "output_type": "np"}}, "base_call may not have height, output_type"),
        ({"mechanism": ClearAttention(radius=4, down_factor=3)}, "down_factor=3 does not divide"),
        ({"mechanism": CLEAR, "apply_options": {"layers": "decoder.*"}}, "matches none of"),
        ({"apply_options": {"layers": "single_*"}}, "need a mechanism"),
        ({"mechanism": "claer"}, "unknown mechanism 'claer'"),
        ({"mechanism": lambda pipe: diffattn.load(pipe, "./no-such-file")}, "no-such-file"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_refusals_come_before_any_work(
    pipe: Any, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], words: str
) -> None:
    monkeypatch.setattr(pipe, "encode_prompt", lambda *_, **__: pytest.fail("the work has begun"))
    before = state(pipe)
    with pytest.raises((ValueError, OSError), match=words):
        large(pipe, **changes)
    assert state(pipe) == before


def test_pipelines_without_image_to_image_are_refused(pipe: Any) -> None:
    with pytest.raises(ValueError, match="no image-to-image pipeline for AnimateDiffPipeline"):
        large(stand_ins.animatediff())
    with pytest.raises(ValueError, match="pipeline with a VAE, got FluxTransformer2DModel"):
        generate_large(pipe.transformer, PROMPT, **SMALL)
    editor = diffusers.FluxKontextPipeline(**pipe.components)
    with pytest.raises(ValueError, match="FluxKontextPipeline edits images but takes no strength"):
        large(editor)


def invoke(*arguments: object) -> typer.testing.Result:
    command = ["generate", "tiny", "--prompt", PROMPT, *map(str, arguments)]
    return typer.testing.CliRunner().invoke(app, command, env={"COLUMNS": "200"})


def test_the_command_line_draws_large_pictures(tmp_path: Path) -> None:
    swap = ["--mechanism", "clear", "-o", "radius=4", "--layers", "single_*", "--swap-steps", "0:"]
    file = tmp_path / "a.png"
    result = invoke("--size", "256x384", "--steps", 2, "--strength", 0.5, "--growth", "inf", *swap, "--output", file)
    assert result.exit_code == 0, result.output
    assert [line.partition(",")[0] for line in result.stdout.splitlines()[:2]] == [
        "88x128: 2 steps",
        "256x384: 1 steps",
    ]
    with Image.open(file) as picture:
        assert picture.size == (384, 256)


@pytest.mark.slow
def test_the_command_line_swaps_the_stages_as_told(pipe: Any, tmp_path: Path) -> None:
    with diffattn.apply(pipe, CLEAR):
        adapter = diffattn.save(pipe, tmp_path)
    everywhere = ["--mechanism", "clear", "-o", "radius=4"]
    swaps = [[], everywhere, ["--adapter", adapter], [*everywhere, "--layers", "single_*"]]
    pictures = []
    for number, swap in enumerate(swaps):
        file = tmp_path / f"{number}.png"
        result = invoke("--size", "192x192", "--via", 96, "--steps", 2, "--strength", 0.5, *swap, "--output", file)
        assert result.exit_code == 0, result.output
        assert result.stdout.startswith("96x96: 2 steps")
        pictures.append(np.asarray(Image.open(file)))
    exact, window, loaded, some_layers = pictures
    assert np.array_equal(window, loaded)
    assert not any(np.array_equal(window, other) for other in (exact, some_layers))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--size", "512"], "--size must be HEIGHTxWIDTH in pixels"),
        (["--size", "250x256"], "multiples of 8 pixels"),
        (["--size", "64x64"], "smaller than via=128"),
        (["--size", "256x256", "--strength", "0"], "strength must be above 0"),
        (["--size", "256x256", "--growth", "1"], "growth must be above 1"),
        (["--size", "256x256", "--height", "256"], "leave --height and --width out"),
        (["--size", "256x256", "--num-images", "2"], "makes one image"),
        (["--via", "64"], "add --size"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_input_ends_with_code_2_and_one_line(arguments: list[str], words: str, tmp_path: Path) -> None:
    result = invoke(*arguments, "--output", tmp_path / "a.png")
    assert result.exit_code == 2, result.output
    [line] = result.stderr.strip().splitlines()
    assert line.startswith("diffattn: error: ") and words in line
    assert not (tmp_path / "a.png").exists()


MEMORY = """
import json, resource
from diffusers import FluxPipeline
import diffattn
from diffattn import ClearAttention, tiny

pipe = FluxPipeline.from_pretrained(tiny.path("flux"))
pipe.set_progress_bar_config(disable=True)
pipe("a red circle", **{**tiny.defaults("flux"), "num_inference_steps": 1})
peaks = [resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024]
for side in (512, 1024):
    diffattn.generate_large(
        pipe, "a red circle", size=(side, side), via=128, mechanism=ClearAttention(radius=8), strength=0.5,
        num_inference_steps=2, guidance_scale=0.0, base_call={"max_sequence_length": 32},
    )
    peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
print(json.dumps(peaks))
"""


@pytest.mark.slow
def test_four_and_eight_times_the_native_side_take_bounded_memory() -> None:
    """At 1024 px the scores of one layer's full attention alone are 4.3 GB: 4 heads x 16,416^2 in float32."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(
        [sys.executable, "-c", MEMORY], env=environment, capture_output=True, text=True, timeout=400, check=False
    )
    assert ended.returncode == 0, ended.stderr
    native, four, eight = json.loads(ended.stdout.splitlines()[-1])
    assert four - native < 0.6e9
    assert eight - native < 1.2e9
