"""The pipeline in one process and on ranks: the same video however it is split, and after going on."""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))  # ranks load this file by itself


import pytest
import tiny_video
import torch
from diffattn.pipelines.long_video import Checkpoints, LongVideoConfig, LongVideoPipeline, open_parts
from diffattn.pipelines.long_video.scheduling import make_scheduler, put_state, state_of
from diffusers import DDPMScheduler, EulerAncestralDiscreteScheduler, EulerDiscreteScheduler, UniPCMultistepScheduler
from parallel_ranks import on_ranks
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from diffattn.parallel import FrameNoise, FramePlan

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers.schedulers")  # of numpy, by diffusers
CPU = torch.device("cpu")
FRAMES, TOLERANCE = 7, 1e-4
"""The tolerance is a share of the largest latent: random weights make them as large as a hundred."""
BASE = tiny_video.config(FRAMES, guidance=2.0)


class StopHere(Exception):
    """Ends a run after a step, as a fault would."""


def pipeline(model: Path, plan: FramePlan, stop_in: int | None = None) -> LongVideoPipeline:
    def report(place: str) -> None:
        if place.startswith(f"step {stop_in} "):
            raise StopHere

    return LongVideoPipeline(open_parts(str(model), None, torch.float32, CPU), plan, report=report)


def make(
    mesh: DeviceMesh | None,
    model: Path,
    config: LongVideoConfig,
    work: Path | None = None,
    stop_in: int | None = None,
    resume_from: int | None = None,
) -> Tensor | None:
    plan = FramePlan.split(config.frames, mesh, config.lengths)
    pipe = pipeline(model, plan, stop_in)
    checkpoints = None if work is None else Checkpoints(work, config, plan, every=1, keep=9)
    state = None
    if checkpoints is not None and resume_from is not None:
        state = checkpoints.read(checkpoints.folder / f"step-{resume_from:06d}", CPU)
    try:
        return pipe(config, checkpoints=checkpoints, resume=state)
    except StopHere:
        return None


@pytest.mark.dist
@pytest.mark.parametrize("scheduler", ["own", "sde-dpmsolver++"])
@pytest.mark.parametrize("lengths", [(4, 3), (1, 5, 1)], ids=str)
@pytest.mark.slow
def test_no_split_changes_the_video(model: Path, scheduler: str, lengths: tuple[int, ...]) -> None:
    config = dataclasses.replace(BASE, scheduler=scheduler)
    want = make(None, model, config)
    assert want is not None and float(want.abs().max()) > 0.1
    got = torch.cat(on_ranks(len(lengths), make, model, dataclasses.replace(config, lengths=lengths)))
    torch.testing.assert_close(got, want, atol=TOLERANCE * float(want.abs().max()), rtol=0)


@pytest.mark.dist
@pytest.mark.parametrize("scheduler", ["own", "sde-dpmsolver++"])
def test_a_run_goes_on_with_any_number_of_ranks(model: Path, tmp_path: Path, scheduler: str) -> None:
    config = dataclasses.replace(BASE, scheduler=scheduler)
    want = make(None, model, config)
    assert want is not None
    on_ranks(3, make, model, config, tmp_path, 3)  # ends in the third step
    for ranks in (1, 2):
        got = torch.cat(on_ranks(ranks, make, model, config, tmp_path, None, 2))
        torch.testing.assert_close(got, want, atol=TOLERANCE * float(want.abs().max()), rtol=0)


@pytest.mark.dist
def test_an_equal_number_of_ranks_goes_on_bit_for_bit(model: Path, tmp_path: Path) -> None:
    config = dataclasses.replace(BASE, scheduler="sde-dpmsolver++")
    want = on_ranks(2, make, model, config)
    on_ranks(2, make, model, config, tmp_path, 4)
    for got, whole in zip(on_ranks(2, make, model, config, tmp_path, None, 3), want, strict=True):
        assert torch.equal(got, whole)


def test_a_checkpoint_of_another_video_is_refused(model: Path, tmp_path: Path) -> None:
    plan = FramePlan((FRAMES,))
    make(None, model, BASE, tmp_path, 2)
    folder = tmp_path / "checkpoints" / "step-000001"
    other = Checkpoints(tmp_path, dataclasses.replace(BASE, seed=6), plan, 1)
    with pytest.raises(ValueError, match="is of a run with seed=5, and this one has 6"):
        other.check(folder)
    Checkpoints(tmp_path, dataclasses.replace(BASE, fps=30, lengths=(3, 4)), plan, 1).check(folder)
    next(folder.glob("*.safetensors")).unlink()
    with pytest.raises(ValueError, match="lacks frames-000000-000007.safetensors"):
        Checkpoints(tmp_path, BASE, plan, 1).check(folder)


def test_only_the_last_checkpoints_stay_and_no_partial_one_is_found(model: Path, tmp_path: Path) -> None:
    pipe = pipeline(model, FramePlan((FRAMES,)))
    (tmp_path / "checkpoints" / ".step-000002.partial").mkdir(parents=True)
    pipe(BASE, checkpoints=Checkpoints(tmp_path, BASE, pipe.plan, every=1))
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-000003", "step-000004"]
    manifest = json.loads((tmp_path / "checkpoints" / "step-000004" / "manifest.json").read_text())
    assert manifest["step"] == 4 and LongVideoConfig.from_dict(manifest["config"]) == BASE


@pytest.mark.parametrize("kind", [DDPMScheduler, EulerAncestralDiscreteScheduler])
def test_schedulers_that_draw_their_own_noise_are_refused(kind: Any) -> None:
    with pytest.raises(ValueError, match="draws noise that would depend on the number of ranks"):
        make_scheduler(kind(), "own")


@pytest.mark.parametrize("kind", [EulerDiscreteScheduler, UniPCMultistepScheduler])
def test_a_scheduler_goes_on_where_it_was(kind: Any) -> None:
    first, second = (make_scheduler(kind(), "own") for _ in range(2))
    outputs, x = torch.randn(5, 3, 4, 2, 2), torch.randn(3, 4, 2, 2)
    for scheduler in (first, second):
        scheduler.set_timesteps(5)
    for step in range(2):
        x = first.step(outputs[step], first.timesteps[step], x, return_dict=False)[0]
    tensors, numbers = state_of(first, x)
    put_state(second, {name: value.clone() for name, value in tensors.items()}, json.loads(json.dumps(numbers)))
    y = x.clone()
    for step in range(2, 5):
        x = first.step(outputs[step], first.timesteps[step], x, return_dict=False)[0]
        y = second.step(outputs[step], second.timesteps[step], y, return_dict=False)[0]
    assert torch.equal(x, y)


def test_without_guidance_the_negative_prompt_is_not_computed(model: Path) -> None:
    pipe = pipeline(model, FramePlan((FRAMES,)))
    assert pipe.encode_prompts(dataclasses.replace(BASE, guidance=1.0)).shape[:2] == (1, FRAMES)
    both = pipe.encode_prompts(BASE)
    assert both.shape[:2] == (2, FRAMES)
    assert torch.equal(both[0, 0], both[0, 6]) and not torch.equal(both[1, 0], both[1, 6])


def test_the_first_noise_is_that_of_the_frames(model: Path) -> None:
    pipe = pipeline(model, FramePlan((FRAMES,)))
    _, state = pipe.start(BASE, None)
    assert torch.equal(state.latents, FrameNoise(5).draw(range(FRAMES), (4, 8, 8)))
    with pytest.raises(ValueError, match="height and width must be multiples of 2, got 15 x 16"):
        pipe.check(dataclasses.replace(BASE, height=15))
