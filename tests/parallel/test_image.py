"""Images in patches: one rank's result on any number of them, whole pipelines included."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import models
import numpy as np
import pytest
import torch
import typer.testing
from diffusers import FluxPipeline
from models import Tiny
from parallel_ranks import on_ranks
from PIL import Image
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

import diffattn
from diffattn import ClearAttention, generate_large, tiny
from diffattn.cli import app
from diffattn.parallel.image import shard
from diffattn.parallel.patches import PatchAttention, Patches
from diffattn.swap.apply import swaps_of

TOLERANCE = 1e-5
"""Of the largest output: SD3's toy in float32 is 3e-5 away from itself in float64, with outputs of up to 7."""
FAMILIES = {"Flux": models.flux, "SD3": models.sd3, "SD3.5": models.sd35}
RADII = [1, 3, 4.5]
"""Of rows that 4 ranks have 1 or 2 of each: the halo comes from further ranks than the neighbours."""


@torch.no_grad()
def run(built: Tiny) -> Tensor:
    output: Tensor = built.model(**built.inputs, return_dict=False)[0]
    return output


def assert_equal(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, atol=TOLERANCE * float(want.abs().max()), rtol=0)


def forward(mesh: DeviceMesh | None, family: str, mechanism: ClearAttention, mode: Any) -> tuple[Tensor, Any]:
    built = FAMILIES[family]()
    diffattn.apply(built.model, mechanism)
    handle = shard(built.model, mesh, mode=mode)
    patches = next(iter(handle.layers)).mechanism.patches  # type: ignore[attr-defined]
    return run(built), dict(patches.traffic.sent)


@pytest.mark.dist
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("radius", RADII)
def test_patches_give_what_one_rank_gives(family: str, ranks: int, radius: float) -> None:
    mechanism = ClearAttention(radius=radius, proportional=True, train_tokens=16)
    built = FAMILIES[family]()
    with diffattn.apply(built.model, mechanism):
        want = run(built)
    assert float((want - run(built)).abs().max()) > 1e-3
    for got, sent in on_ranks(ranks, forward, family, mechanism, "exact"):
        assert_equal(got, want)
        assert (sent.get("halo", 0) > 0) == (ranks > 1 and radius > 1)


@pytest.mark.dist
@pytest.mark.parametrize("family", ["Flux", "SD3"])
def test_the_papers_text_is_the_mean_of_the_patches(family: str) -> None:
    mechanism = ClearAttention(radius=3)
    exact = forward(None, family, mechanism, "exact")[0]
    assert_equal(forward(None, family, mechanism, "paper")[0], exact)
    first, second = (got for got, _ in on_ranks(2, forward, family, mechanism, "paper"))
    assert torch.equal(first, second)
    assert float((first - exact).abs().max()) > 1e-4


def attend(mesh: DeviceMesh | None, mechanism: ClearAttention, rows: int, columns: int, text: int) -> dict[str, int]:
    patches = Patches(mesh)
    plan = patches.begin(rows)
    grid = diffattn.TokenGrid(plan.length, columns, before=text)
    q, k, v = (torch.randn(2, 3, grid.tokens, 8) for _ in range(3))
    PatchAttention(mechanism=mechanism, patches=patches).attend(q, k, v, grid)
    return dict(patches.traffic.sent)


@pytest.mark.dist
def test_bytes_are_those_of_the_halo_and_the_text() -> None:
    middle = on_ranks(3, attend, ClearAttention(radius=3), 18, 5, 4)[1]
    assert middle["halo"] == 2 * 2 * 2 * (2 * 3 * 5 * 8) * 4  # k and v, two sides, two rows of b h columns d
    assert middle["merge"] == 2 * 3 * 4 * (8 + 1) * 4
    longer = on_ranks(3, attend, ClearAttention(radius=3), 36, 5, 4)[1]
    assert longer == middle


def draw(mesh: DeviceMesh | None, large: bool) -> Tensor:
    pipe = FluxPipeline.from_pretrained(tiny.path("flux"))
    pipe.set_progress_bar_config(disable=True)
    call = {**tiny.defaults("flux"), "num_inference_steps": 2, "height": 64, "width": 48}
    prompt, generator = "a red circle on a blue background", torch.Generator().manual_seed(3)
    if not large:
        diffattn.apply(pipe, "clear", radius=2)
        shard(pipe, mesh)
        picture: Tensor = pipe(prompt, generator=generator, output_type="pt", **call).images
        return picture

    def in_patches(pipe: Any) -> Any:
        diffattn.apply(pipe, "clear", radius=3, ntk_factor=10)
        return shard(pipe, mesh)

    result = generate_large(
        pipe, prompt, size=(128, 96), via=64, mechanism=in_patches, num_inference_steps=2, strength=0.5,
        guidance_scale=0.0, generator=generator, base_call={"max_sequence_length": 32},
    )  # fmt: skip
    assert not swaps_of(pipe)
    return torch.tensor(list(result.picture.tobytes()), dtype=torch.uint8).float() / 255


@pytest.mark.dist
@pytest.mark.parametrize("large", [False, True], ids=["one size", "in stages"])
def test_whole_pipelines_draw_the_same_picture_on_every_rank(large: bool) -> None:
    want = draw(None, large)
    for got in on_ranks(3, draw, large):
        torch.testing.assert_close(got, want, atol=1.01 / 255 if large else 1e-4, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_restore_is_bit_exact(family: str) -> None:
    built = FAMILIES[family]()
    want, attributes = run(built), set(vars(built.model)) | set(vars(getattr(built.model, "pos_embed", built.model)))
    diffattn.apply(built.model, "clear", radius=2)
    assert not torch.equal(run(built), want)
    shard(built.model).restore()
    assert torch.equal(run(built), want)
    assert attributes == set(vars(built.model)) | set(vars(getattr(built.model, "pos_embed", built.model)))


@pytest.mark.parametrize(
    ("build", "options", "error", "message"),
    [
        (models.flux, None, ValueError, "shard needs one swapped model, found 0: call diffattn.apply"),
        (models.flux, {"mechanism": "agent", "num_agents": 4}, TypeError, "patches of an image are for clear"),
        (models.flux, {"mechanism": "clear", "radius": 2, "min_tokens": 10}, ValueError, "leave some attention full"),
        (models.flux, {"mechanism": "clear", "radius": 2, "layers": "single*"}, ValueError, "keep full attention"),
        (models.wan, {"mechanism": "clear", "radius": 2}, ValueError, "can't be cut into patches yet"),
    ],
)
def test_what_patches_cannot_do_is_refused(build: Any, options: Any, error: type[Exception], message: str) -> None:
    built = build()
    if options is not None:
        diffattn.apply(built.model, **options)
    before = run(built)
    with pytest.raises(error, match=message):
        shard(built.model)
    assert torch.equal(run(built), before)


def test_pooled_keys_modes_and_a_second_time_are_refused() -> None:
    built = models.flux()
    diffattn.apply(built.model, "clear", radius=2, down_factor=2)
    with pytest.raises(ValueError, match="sees pooled keys of the whole image"):
        shard(built.model)
    diffattn.apply(built.model, "clear", radius=2)
    with pytest.raises(ValueError, match="mode must be 'exact' or 'paper', got 'fast'"):
        shard(built.model, mode="fast")  # type: ignore[arg-type]
    shard(built.model)
    with pytest.raises(ValueError, match="sharded already"):
        shard(built.model)


def test_reference_pictures_and_controlnets_are_refused_in_the_forward() -> None:
    built = models.flux_kontext()
    diffattn.apply(built.model, "clear", radius=2)
    shard(built.model)
    with pytest.raises(ValueError, match="12 tokens of reference images are not split"):
        run(built)
    built = models.flux()
    diffattn.apply(built.model, "clear", radius=2)
    shard(built.model)
    built.inputs["controlnet_block_samples"] = [torch.zeros(1)]
    with pytest.raises(ValueError, match="controlnet_block_samples is not split over patches"):
        run(built)


def too_many(mesh: DeviceMesh) -> str:
    try:
        forward(mesh, "Flux", ClearAttention(radius=2), "exact")
    except ValueError as error:
        return str(error)
    return "nothing raised"


@pytest.mark.dist
@pytest.mark.slow
def test_fewer_rows_than_ranks_are_refused_on_every_rank() -> None:
    rows = models.ROWS
    for message in on_ranks(rows + 1, too_many):
        assert f"an image of {rows} rows of tokens can't be split among {rows + 1} ranks" in message


def test_the_reach_is_that_of_the_disc() -> None:
    for radius, reach in ((0.5, 0), (1, 0), (1.5, 1), (2, 1), (2.01, 2), (16, 15)):
        assert PatchAttention(mechanism=ClearAttention(radius=radius), patches=Patches()).reach == reach


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize("large", [(), ("--size", "160x96", "--strength", "0.5")], ids=["one size", "in stages"])
def test_the_command_line_draws_in_patches(tmp_path: Path, large: tuple[str, ...]) -> None:
    options = ["generate", "tiny", "--prompt", "a red circle", "--mechanism", "clear", "-o", "radius=3", "--steps", "2"]

    def call(name: str, *command: str) -> np.ndarray:
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2]), "OMP_NUM_THREADS": "1"}
        ended = subprocess.run(
            [sys.executable, "-m", *command, *options, *large, "--output", str(tmp_path / name)],
            env=environment, capture_output=True, text=True, timeout=200, check=False,
        )  # fmt: skip
        assert ended.returncode == 0, ended.stderr
        assert ended.stdout.count("wrote") == 1
        with Image.open(tmp_path / name) as picture:
            return np.asarray(picture).astype(int)

    alone = call("alone.png", "diffattn")
    options.append("--parallel")
    shared = call("shared.png", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "diffattn")
    assert np.abs(alone - shared).max() <= 1


def test_the_command_line_needs_torchrun_and_a_local_attention(tmp_path: Path) -> None:
    runner = typer.testing.CliRunner()
    start = ["generate", "tiny", "--prompt", "x", "--parallel", "--output", str(tmp_path / "x.png")]
    for more, words in (((), "add --mechanism clear"), (("--mechanism", "clear", "-o", "radius=2"), "torchrun")):
        result = runner.invoke(app, [*start, *more])
        assert result.exit_code == 2 and words in " ".join(result.output.split())
