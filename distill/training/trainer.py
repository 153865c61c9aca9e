"""The training loop: one config, one model, any number of processes.

`accelerate` brings devices, mixed precision, gradient scaling, trackers and DistributedDataParallel; `sharding.py`
splits the weights instead where the config says so. What a step computes:

    teacher's pass (no gradients) -> student's pass -> losses -> gradients, clipped -> optimizer, averaged weights

or, in the first `layerwise` steps, every layer by itself (`layerwise.py`). Where options of the mechanism are drawn, a
step has one setting.

Batches are cut into processes x accumulated parts; since every sample brings its own random numbers
(`data/samples.py`), the cut does not change the gradient, and a resumed run goes on bit for bit.
"""

import contextlib
import importlib.util
import logging
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor, nn
from tqdm.auto import tqdm

from diffattn.measure.progress import bar_options

from ..config import DistillConfig
from ..data.samples import Batch, Source, collate, index_at, places
from ..inputs import predict
from ..objective import Noised, add_noise
from ..student import Student
from . import checkpoints
from .layerwise import LayerByLayer
from .listening import Said, listeners
from .log import Log
from .losses import losses
from .sharding import (
    average_gradients,
    check_processes,
    clip_gradients,
    scatter,
    scattered_state,
    shard,
    split,
    whole,
    whole_state,
)
from .stopping import told_to_stop
from .teacher_memory import TeacherMemory, fingerprint

logger = logging.getLogger("diffattn")


@dataclass
class Outcome:
    """How a run ended."""

    step: int
    """Steps that are done."""
    finished: bool
    """False where it was told to stop before."""
    totals: list[float] = field(default_factory=list)
    """The total loss of every step of this call."""


class Trainer:
    """Trains a student from samples; `run` may be called again to go on."""

    def __init__(
        self,
        config: DistillConfig,
        student: Student,
        scheduler: Any,
        source: Source,
        folder: Path,
        accelerator: Accelerator | None = None,
        draw_sheet: Callable[[int], Path] | None = None,
    ) -> None:
        """`draw_sheet(step)` draws the sheets that `config.sheet_every` asks for, and gives the file."""
        self.config, self.student, self.scheduler, self.source, self.folder = config, student, scheduler, source, folder
        self.accelerator = accelerator or make_accelerator(config, folder)
        self.draw_sheet = draw_sheet
        self.parts = self.accelerator.num_processes * config.accumulation
        places(0, config.batch_size, 0, self.parts)
        check_processes(config, self.accelerator)
        if len(source) == 0:
            raise ValueError("there are no samples to train on")
        if config.layerwise and config.sharded:
            raise ValueError(
                "layerwise= holds layers one by one, which sharded=true takes apart: leave one of them out"
            )
        self.settings = config.settings
        self.attention, self.features = listeners(config, student)
        self.memory = self._memory() if config.teacher_cache else None
        if config.gradient_checkpointing:
            student.model.enable_gradient_checkpointing()  # type: ignore[operator]
        student.model.train()
        self.model = self._spread()
        self.weights = list(student.parameters.values())
        self.outside = [weight for name, weight in student.parameters.items() if name not in self.inside]
        self.optimizer = self.accelerator.prepare(make_optimizer(config, self.weights))
        self.average = [weight.detach().clone() for weight in self.weights] if config.ema else []
        self.step = 0

    def _memory(self) -> TeacherMemory:
        """Where the teacher's words are kept; asked for before the weights are trained or split."""
        config = self.config
        asked = (config.model, fingerprint(self.student.model), config.precision, str(config.guidance))
        whom = (*self.attention.names, "blocks", *self.features.names, str(bool(config.loss.prediction)))
        return TeacherMemory(self.folder / "teacher", config.teacher_cache, (*asked, *whom))

    def _spread(self) -> nn.Module:
        """The student's model over the processes: in shards, or wrapped, or as it is."""
        model = self.student.model
        self.inside = {name for name, _ in model.named_parameters() if name in self.student.parameters}
        if self.config.sharded:
            shard(self.student)
            return model
        # DistributedDataParallel refuses a model that trains nothing: a mechanism's own weights lie outside it.
        wrapped: nn.Module = self.accelerator.prepare(model) if self.inside else model
        return wrapped

    def run(self, *, resume: bool = False, until: int | None = None, progress: bool = False) -> Outcome:
        """Train up to step `until` (None: all of them); with `resume` from the last checkpoint of the folder."""
        if resume:
            self.resume()
        last = self.config.steps if until is None else min(until, self.config.steps)
        outcome = Outcome(self.step, False)
        self._report_to(self.config.trackers)
        main = self.accelerator.is_main_process
        with told_to_stop() as stop, self.student.returning(), Log(self.folder, self.step, main) as log:
            bar = tqdm(
                range(self.step, last),
                desc="distilling",
                initial=self.step,
                total=last,
                **bar_options(progress and main, leave=True),
            )
            for _ in bar:
                row = self.train_step()
                outcome.totals.append(row["total"])
                log.write(row)
                self.accelerator.log({name: value for name, value in row.items() if name != "step"}, step=self.step)
                bar.set_postfix(loss=f"{row['total']:.4f}", refresh=False)
                if self._agree(stop.asked):
                    break
                if self.step % self.config.save_every == 0 or self.step == self.config.steps:
                    self.save()
                if self.config.sheet_every and self.step % self.config.sheet_every == 0:
                    self._sheet()
            if self.step not in checkpoints.find(self.folder):
                self.save()
        for tracker in self.accelerator.trackers:  # end_training would also end the process group
            tracker.finish()
        outcome.step, outcome.finished = self.step, self.step == self.config.steps
        if outcome.finished and self.memory is not None and self.accelerator.is_main_process:
            self.memory.forget()
        return outcome

    def _report_to(self, trackers: tuple[str, ...]) -> None:
        """Start the trackers, with the config as their hyperparameters."""
        if trackers:
            values = {**self.config.to_dict(), "mechanism": str(self.config.mechanism)}
            plain = {name: value for name, value in values.items() if isinstance(value, (int, float, str))}
            self.accelerator.init_trackers("diffattn", plain)

    def _sheet(self) -> None:
        """Draw a sheet, and show it to the trackers; with whole weights that is the work of the first process."""
        if self.draw_sheet is None or not (self.config.sharded or self.accelerator.is_main_process):
            return
        self.student.model.eval()
        self.student.use(self.config.mechanism)
        path = self.draw_sheet(self.step)
        self.student.model.train()
        if self.accelerator.is_main_process and self.accelerator.trackers:
            with Image.open(path) as picture:
                pixels = np.asarray(picture.convert("RGB"))
            for tracker in self.accelerator.trackers:
                if hasattr(tracker, "log_images"):
                    tracker.log_images({"teacher, student, swap alone": pixels[None]}, step=self.step, **_axes(tracker))

    def train_step(self) -> dict[str, float]:
        """One batch, one update; returns the numbers of the log."""
        start = time.perf_counter()
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.rate_at(self.step)
        self.student.use(self.settings[index_at(self.step, len(self.settings), self.config.seed)])
        by_layers = self.step < self.config.layerwise
        sums: dict[str, float] = {}
        for number in range(self.config.accumulation):
            part = self.accelerator.process_index * self.config.accumulation + number
            found = self._learn_by_layers(part) if by_layers else self._learn(part)
            for name, value in found.items():
                sums[name] = sums.get(name, 0.0) + value / self.config.accumulation
        sums = self._mean(sums)
        if not math.isfinite(sums["total"]):
            raise FloatingPointError(
                f"the loss of step {self.step} is {sums['total']}: nothing was updated in it; lower the rate, or use "
                f"precision bf16 instead of fp16. The last checkpoint is as it was"
            )
        average_gradients(self.weights if by_layers else self.outside)
        norm = self._clip(self.config.clip or math.inf)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self._average()
        self.step += 1
        return {
            "step": self.step,
            **sums,
            "rate": self.config.rate_at(self.step - 1),
            "gradient_norm": float(norm) if norm is not None else math.nan,
            "seconds": time.perf_counter() - start,
        }

    @contextlib.contextmanager
    def _gathering_gradients(self, last: bool) -> Iterator[None]:
        """Processes exchange gradients in the backward pass of the last part of a batch alone."""
        if self.config.sharded:
            self.model.set_requires_gradient_sync(last)  # type: ignore[operator]
            yield
            return
        with contextlib.nullcontext() if last or not self.inside else self.accelerator.no_sync(self.model):
            yield

    def _clip(self, limit: float) -> Tensor:
        """Clip all gradients together; returns their norm before."""
        if self.config.sharded:
            return clip_gradients(self.weights, limit)
        norm: Tensor = self.accelerator.clip_grad_norm_(self.weights, limit)
        return norm

    def _learn(self, part: int) -> dict[str, float]:
        """The gradients of one part of the present batch; returns its losses."""
        last = part % self.config.accumulation == self.config.accumulation - 1
        with self._gathering_gradients(last):
            batch, noised = self._batch(part)
            teacher = self._teacher(batch, noised) if self.config.loss.teacher else Said(None)
            own = self._said(self.model, batch, noised)
            found = losses(
                self.config.loss,
                own.prediction,
                noised.target,
                teacher.prediction,
                own.attention,
                teacher.attention,
                own.features,
                teacher.features,
            )
            self.accelerator.backward(found.total / self.config.accumulation)
        return found.values()

    def _learn_by_layers(self, part: int) -> dict[str, float]:
        """The same of every layer by itself."""
        batch, noised = self._batch(part)
        share = self.config.accumulation
        lessons = LayerByLayer(self.student, lambda loss: self.accelerator.backward(loss / share))
        with self.accelerator.autocast(), lessons:
            predict(self.student.model, noised, batch.conditioning, self.config.guidance)
        return {"layers": lessons.loss, "total": lessons.loss}

    def _batch(self, part: int) -> tuple[Batch, Noised]:
        """One part of the present batch, and it noised."""
        chosen = places(self.step, self.config.batch_size, part, self.parts)
        batch = collate(self.source, chosen, self.config.seed, self.config.noises).to(self.accelerator.device)
        return batch, add_noise(self.scheduler, batch)

    def _teacher(self, batch: Batch, noised: Noised) -> Said:
        """What the teacher says, now or at an earlier visit."""

        def asked() -> Said:
            with self.student.teacher():
                return self._said(self.student.model, batch, noised)

        return asked() if self.memory is None else self.memory.ask(batch, noised, asked)

    def _said(self, model: nn.Module, batch: Batch, noised: Noised) -> Said:
        with self.accelerator.autocast(), self.attention, self.features:
            prediction = predict(model, noised, batch.conditioning, self.config.guidance)
        return Said(prediction, tuple(self.attention.outputs), tuple(self.features.outputs))

    def _average(self) -> None:
        """Fold the weights into their running average, with a shorter memory at first."""
        share = max(1 - self.config.ema, 1 / (self.step + 10))
        for average, weight in zip(self.average, self.weights, strict=bool(self.average)):
            average.lerp_(weight.detach(), share)

    def _mean(self, values: dict[str, float]) -> dict[str, float]:
        """The means over all processes."""
        if self.accelerator.num_processes == 1:
            return values
        mine = torch.tensor(list(values.values()), dtype=torch.float64, device=self.accelerator.device)
        whole: Tensor = self.accelerator.reduce(mine, reduction="mean")
        return dict(zip(values, whole.tolist(), strict=True))

    def _agree(self, asked: bool) -> bool:
        """Has any process been told to stop?"""
        return self._mean({"asked": float(asked)})["asked"] > 0

    def state(self) -> dict[str, Any]:
        """All that a resumed run needs, whole, on any number of processes; all of them must ask for it."""
        weights = {name: whole(weight) for name, weight in self.student.parameters.items()}
        average = [whole(weight) for weight in self.average]
        return {"weights": weights, "average": average, "optimizer": whole_state(self.optimizer.state_dict())}

    def save(self) -> None:
        """Write a checkpoint of the present step."""
        state = self.state() if self.config.sharded or self.accelerator.is_main_process else {}
        if self.accelerator.is_main_process:
            checkpoints.write(self.folder, self.step, state, self.config, self.config.keep)
        self.accelerator.wait_for_everyone()

    def resume(self) -> None:
        """Take the last checkpoint of the folder, where there is one; other settings than its own are told, and hold.

        Raises `ValueError`, with nothing changed, for a checkpoint that is broken, of another run, or of a later step
        than the last of this one.
        """
        found = checkpoints.find(self.folder)
        if not found:
            return
        folder = list(found.values())[-1]
        state = checkpoints.read(folder, self.config)
        self._check(state, folder)
        with torch.no_grad():
            for name, weight in self.student.parameters.items():
                weight.copy_(scatter(state["weights"][name], weight))
            for own, saved in zip(self.average, state["average"], strict=True):
                own.copy_(scatter(saved, own))
        self.optimizer.load_state_dict(scattered_state(state["optimizer"], self.optimizer))
        for group in self.optimizer.param_groups:  # the checkpoint has brought its own
            group["betas"], group["weight_decay"] = self.config.betas, self.config.weight_decay
        self.step = int(state["step"])
        former, now = checkpoints.read_config(folder).to_dict(), self.config.to_dict()
        changed = [f"{name} {former[name]} -> {value}" for name, value in now.items() if value != former[name]]
        if changed:
            logger.warning("from step %d on with other settings: %s", self.step, "; ".join(changed))

    def _check(self, state: dict[str, Any], folder: Path) -> None:
        """Raise where a checkpoint does not fit the student, or lies beyond the last step."""
        if state["step"] > self.config.steps:
            raise ValueError(
                f"{folder} is of step {state['step']}, and steps={self.config.steps} end before it: give steps of at "
                f"least {state['step']}, or another folder"
            )
        own = {name: tuple(weight.shape) for name, weight in self.student.parameters.items()}
        got = {name: tuple(weight.shape) for name, weight in state["weights"].items()}
        averaged = [tuple(weight.shape) for weight in state["average"]]
        if own != got or averaged not in ([], list(own.values())):
            raise ValueError(f"the checkpoint in {self.folder} holds other weights than this student trains")
        sizes = [len(group["params"]) for group in self.optimizer.state_dict()["param_groups"]]
        groups = state["optimizer"].get("param_groups")
        if not isinstance(groups, list) or [len(group["params"]) for group in groups] != sizes:
            raise ValueError(f"the optimizer's state in {folder} is not that of this run; use another folder")

    @torch.no_grad()
    def use_average(self) -> None:
        """Put the averaged weights in place, for export."""
        for weight, average in zip(self.weights, self.average, strict=bool(self.average)):
            weight.copy_(average)


def make_accelerator(config: DistillConfig, folder: Path) -> Accelerator:
    """accelerate by a config; raises `ImportError` for a tracker that is not installed: accelerate passes over it."""
    for name in config.trackers:
        if importlib.util.find_spec(name) is None:
            raise ImportError(f"the tracker {name} is not installed: pip install {name}, or leave it out of trackers")
    return Accelerator(mixed_precision=config.precision, log_with=list(config.trackers) or None, project_dir=folder)


def _axes(tracker: Any) -> dict[str, str]:
    """TensorBoard asks for the order of the axes of an image."""
    return {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}


def make_optimizer(config: DistillConfig, weights: list[nn.Parameter]) -> torch.optim.Optimizer:
    """AdamW, or Prodigy with the settings of CLEAR's release."""
    groups = [{"params": group} for group in split(weights) if group]
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=config.rate, betas=config.betas, weight_decay=config.weight_decay)
    try:
        from prodigyopt import Prodigy
    except ImportError as error:
        raise ImportError('the optimizer prodigy needs prodigyopt: pip install "diffattn[train]"') from error
    return Prodigy(
        groups,
        lr=config.rate,
        betas=config.betas,
        weight_decay=config.weight_decay,
        decouple=True,
        use_bias_correction=True,
        safeguard_warmup=True,
        eps=1e-8,
    )
