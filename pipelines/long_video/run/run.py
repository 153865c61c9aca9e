"""A run from its settings to its file: what the command does on every rank."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from diffattn import tiny
from diffattn.files.records import check_record, path_beside, recorded
from diffattn.parallel import FramePlan

from ..checkpoints import Checkpoints, State, found_in
from ..config import LongVideoConfig
from ..loading import fingerprint, open_parts
from ..pipeline import LongVideoPipeline
from ..prompts import PromptRange, as_ranges, read_prompts
from ..video import check_output
from ..work import WorkFolder
from .ranks import Ranks
from .watch import Watch


@dataclass(frozen=True)
class Request:
    """What was asked for, apart from the video itself."""

    settings: dict[str, Any]
    """Fields of `LongVideoConfig`, from a file and from options."""
    output: Path
    prompt: str | None = None
    """One for all frames."""
    prompts: Path | None = None
    """Prompt file."""
    work: Path | None = None
    save_every: int = 5
    resume: bool = False
    keep: bool = False
    """Keep the checkpoints of a finished run."""
    overwrite: bool = False
    """Replace an output that is there."""

    @property
    def folder(self) -> WorkFolder:
        return WorkFolder(self.output, self.work)


class RunError(RuntimeError):
    """A run that ended on the way; the text names rank and step."""


def make_config(request: Request) -> LongVideoConfig:
    """The settings with what the model and the prompts bring."""
    values = {**native_settings(request.settings.get("model", "tiny")), **request.settings}
    if request.prompts is not None:
        values["prompts"] = read_prompts(request.prompts)
    if request.prompt is not None:
        values["prompts"] = (PromptRange(0, values.setdefault("frames", 48), request.prompt),)
    if "prompts" not in values:
        raise ValueError("a prompt is needed: give --prompt, --prompts or --config")
    values["prompts"] = as_ranges(values["prompts"], "prompts")
    values.setdefault("frames", max(part.end for part in values["prompts"]))
    return LongVideoConfig.from_dict(values)


def native_settings(model: str) -> dict[str, Any]:
    """What suits the bundled pipeline, and VideoCrafter2 and its like.

    The released biases of 10 let a frame see one of its scopes at a time. The bundled model carries what the object is
    over both, so it goes without.
    """
    if model != "tiny":
        return {"height": 320, "width": 512}
    call = tiny.defaults("video")
    return {
        "height": call["height"],
        "width": call["width"],
        "steps": call["num_inference_steps"],
        "guidance": call["guidance_scale"],
        "train_frames": call["num_frames"],
        "padding": 4,
        "top_k": 32,
        "local_phase": None,
        "global_phase": None,
    }


def run(
    request: Request, ranks: Ranks, device: torch.device, dtype: torch.dtype, timeout: float, progress: bool
) -> None:
    """Check everything, then make the video. Wrong input raises before the first step, on all ranks alike."""
    work = request.folder
    with Watch(ranks.rank, ranks.size, ranks.store, timeout) as watch:
        watch.at("the preparation")
        try:
            pipe, config, checkpoints, state = prepare(request, work, ranks, device, dtype, watch)
            pipe.bars = progress and ranks.rank == 0
        except RuntimeError as error:
            raise RunError(watch.failed(error)) from error
        try:
            pipe(config, request.output, work=work.path, checkpoints=checkpoints, resume=state, overwrite=True)
            if ranks.rank == 0:
                record(request, config, device, dtype, ranks.size)
                work.note_output()
                if not request.keep:
                    work.remove()
            ranks.gather(None)
        except Exception as error:
            raise RunError(watch.failed(error)) from error


def record(request: Request, config: LongVideoConfig, device: torch.device, dtype: torch.dtype, ranks: int) -> None:
    """Leave what made the video beside it."""
    settings = config.to_dict()
    if len(config.prompts) == 1:
        settings["prompt"] = settings.pop("prompts")[0]["prompt"]  # holds for another number of frames as well
    how = {"output": request.output, "save_every": request.save_every, "keep": request.keep}
    where = {"device": device.type, "dtype": str(dtype).removeprefix("torch."), "threads": torch.get_num_threads()}
    made = {"files": [request.output], "height": config.height, "width": config.width, "frames": config.frames}
    with recorded(path_beside(request.output), "long-video", {**settings, **how, **where}) as found:
        found |= {**made, "processes": ranks}


def prepare(
    request: Request, work: WorkFolder, ranks: Ranks, device: torch.device, dtype: torch.dtype, watch: Watch
) -> tuple[LongVideoPipeline, LongVideoConfig, Checkpoints, State | None]:
    """Everything up to the first step; all ranks know after it that they compute the same.

    Where it raises, nothing is left of a run that was to begin.
    """
    config = ranks.together(lambda: make_config(request))
    ranks.agree("the settings", {**config.to_dict(), "dtype": str(dtype), "output": str(request.output)})
    how = {"work": str(work.path), "save_every": request.save_every, "resume": request.resume}
    ranks.agree("how to run", how)
    plan = FramePlan.split(config.frames, ranks.mesh, config.lengths)
    ranks.together(lambda: check_output(request.output, config.height, config.width, overwrite=True))
    checkpoints = Checkpoints(work.path, config, plan, request.save_every)
    ranks.together(work.check_place)
    last = ranks.together(lambda: _last_checkpoint(request, work, checkpoints))
    ranks.agree("the checkpoint", {"folder": None if last is None else last.name})
    ranks.together(lambda: _check_output(request, work, config))
    try:
        _make_shared(work, ranks, request.resume)
        watch.at("loading the model")
        parts = ranks.together(lambda: open_parts(config.model, config.unet, dtype, device))
        weights = {name: fingerprint(getattr(parts, name)) for name in ("unet", "text_encoder", "vae")}
        ranks.agree("the weights of the model", weights)
        pipe = LongVideoPipeline(parts, plan, report=watch.at)
        pipe.check(config)
        settings = {"dtype": str(dtype), "contents": weights}
        ranks.together(lambda: work.open(settings, request.resume) if ranks.rank == 0 else None)
    except Exception:
        if ranks.rank == 0 and not request.resume:
            work.remove()
        raise
    state = None if last is None else ranks.together(lambda: checkpoints.read(last, device))
    return pipe, config, checkpoints, state


def _check_output(request: Request, work: WorkFolder, config: LongVideoConfig) -> None:
    """Raise where the output can't be written, or would replace what this run did not make."""
    check_record(path_beside(request.output), overwrite=request.overwrite)
    own = request.resume and work.wrote_output
    check_output(
        request.output,
        config.height,
        config.width,
        overwrite=request.overwrite or own,
        count=config.frames if request.resume else None,
    )


def _last_checkpoint(request: Request, work: WorkFolder, checkpoints: Checkpoints) -> Path | None:
    """The newest whole checkpoint, if it is to be gone on with; else there must be nothing that would be mixed up."""
    found = found_in(checkpoints.folder)
    if not request.resume:
        if found:
            raise ValueError(
                f"{work.path} has checkpoints of a run up to step {max(found)}: add --resume to go on with it, or "
                f"remove the folder"
            )
        work.check_others()
        return None
    if not found:
        raise ValueError(f"--resume: there is no checkpoint in {work.path}; leave --resume out")
    if not work.is_of_run:
        raise ValueError(f"--resume: {work.path} bears no mark of a run (settings.json); leave --resume out")
    last = found[max(found)]
    checkpoints.check(last)
    return last


def _make_shared(work: WorkFolder, ranks: Ranks, resume: bool) -> None:
    """Make the folder, empty unless `resume`; raise where a rank does not see what the first one writes into it."""
    probe = work.path / ".shared"

    def write() -> None:
        if ranks.rank == 0:
            if not resume:
                work.clear()
            work.make()
            probe.touch()

    def see() -> None:
        if not probe.exists():
            raise ValueError(
                f"rank {ranks.rank} does not see {work.path} of rank 0; use a folder that all machines share"
            )

    ranks.together(write)
    ranks.together(see)
    if ranks.rank == 0:
        probe.unlink()
