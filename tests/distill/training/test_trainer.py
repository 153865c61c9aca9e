"""Training: the same run however it is cut, interrupted or resumed; and errors before anything is spoiled."""

import math
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffattn.distill.config import DistillConfig
from diffattn.distill.student import Student, make_student
from diffattn.distill.training import checkpoints
from diffattn.distill.training.listening import attention_layers
from diffattn.distill.training.log import LOG, read_log
from diffattn.distill.training.losses import LossWeights
from diffattn.distill.training.trainer import Trainer
from torch import Tensor
from toys import Noise, config, flux_model, scheduler

from diffattn import AgentAttention, LinearAttention

TESTS = Path(__file__).resolve().parents[2]


def trainer(folder: Path, chosen: DistillConfig | None = None, source: Any = None) -> Trainer:
    chosen = chosen or config()
    student = make_student(flux_model(), chosen.mechanism, trainable=chosen.trainable, layers=chosen.layers)
    return Trainer(chosen, student, scheduler(), source or Noise(), folder)


def weights(student: Student) -> Tensor:
    return torch.cat([weight.detach().flatten() for weight in student.parameters.values()])


def test_training_lowers_the_teachers_losses(tmp_path: Path) -> None:
    chosen = config(steps=60, rate=5e-3, loss=LossWeights(target=0, prediction=1, attention=0.5))
    run = trainer(tmp_path, chosen)
    outcome = run.run()
    assert outcome.finished and len(outcome.totals) == 60
    first, last = sum(outcome.totals[:10]), sum(outcome.totals[-10:])
    assert last < 0.7 * first
    rows = read_log(tmp_path / LOG)
    assert [row["step"] for row in rows] == list(range(1, 61))
    assert all(math.isfinite(row["prediction"]) and "target" not in row for row in rows)


def test_only_the_chosen_parameters_change(tmp_path: Path) -> None:
    run = trainer(tmp_path, config(steps=2))
    before = {name: value.clone() for name, value in run.student.model.state_dict().items()}
    run.run()
    after = run.student.model.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == set(run.student.parameters)
    assert changed == {name for name in before if any(f".attn.to_{part}." in name for part in ("q", "k", "v", "out"))}


@pytest.mark.parametrize("accumulation", [2, 4])
def test_accumulated_parts_equal_one_batch(tmp_path: Path, accumulation: int) -> None:
    whole, parted = trainer(tmp_path / "a"), trainer(tmp_path / "b", config(accumulation=accumulation))
    totals, other = whole.run().totals, parted.run().totals
    assert other == pytest.approx(totals, rel=1e-5)
    torch.testing.assert_close(weights(parted.student), weights(whole.student), atol=2e-5, rtol=0)


def test_gradient_checkpointing_changes_nothing(tmp_path: Path) -> None:
    plain, saving = trainer(tmp_path / "a"), trainer(tmp_path / "b", config(gradient_checkpointing=True))
    assert saving.run().totals == pytest.approx(plain.run().totals, rel=1e-5)
    torch.testing.assert_close(weights(saving.student), weights(plain.student), atol=2e-5, rtol=0)


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_a_resumed_run_ends_bit_for_bit_as_an_uninterrupted_one(tmp_path: Path, ema: float) -> None:
    whole = trainer(tmp_path / "whole", config(ema=ema))
    whole.run()
    trainer(tmp_path / "cut", config(ema=ema)).run(until=4)
    again = trainer(tmp_path / "cut", config(ema=ema))
    outcome = again.run(resume=True)
    assert (again.step, outcome.finished, len(outcome.totals)) == (6, True, 2)
    assert torch.equal(weights(again.student), weights(whole.student))
    assert all(torch.equal(a, b) for a, b in zip(again.average, whole.average, strict=True))
    times = ("seconds",)
    rows = [[{k: v for k, v in row.items() if k not in times} for row in read_log(tmp_path / n / LOG)]
            for n in ("cut", "whole")]  # fmt: skip
    assert rows[0] == rows[1] and len(rows[0]) == 6


KILLED = """
import os, signal, sys
from pathlib import Path
import torch
from toys import Noise, config, flux_model, scheduler
from diffattn.distill.student import make_student
from diffattn.distill.training.trainer import Trainer
from diffattn.distill.training import checkpoints

folder, moment = Path(sys.argv[1]), sys.argv[2]
chosen = config(save_every=2)
trainer = Trainer(chosen, make_student(flux_model(), chosen.mechanism), scheduler(), Noise(), folder)
if moment == "during":
    save = torch.save
    def half(state, path):
        save(state, path)
        if state["step"] == 4:
            os.truncate(path, os.path.getsize(path) // 2)
            os.kill(os.getpid(), signal.SIGKILL)
    torch.save = half
else:
    step = trainer.train_step
    def last():
        row = step()
        if trainer.step == int(moment):
            os.kill(os.getpid(), getattr(signal, sys.argv[3]))
        return row
    trainer.train_step = last
outcome = trainer.run(resume=True)
print("ended at", outcome.step)
"""


def in_a_process(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join([str(TESTS.parent), str(TESTS)])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", KILLED, str(folder), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize(("moment", "saved"), [("5", [2, 4]), ("during", [2])])
@pytest.mark.slow
def test_a_killed_run_resumes_bit_for_bit(tmp_path: Path, moment: str, saved: list[int]) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    whole = trainer(tmp_path / "whole", config(save_every=2))
    whole.run()
    died = in_a_process(tmp_path / "cut", moment, "SIGKILL")
    assert died.returncode == -signal.SIGKILL, died.stderr
    assert list(checkpoints.find(tmp_path / "cut")) == saved
    again = trainer(tmp_path / "cut", config(save_every=2))
    again.run(resume=True)
    torch.set_num_threads(threads)
    assert torch.equal(weights(again.student), weights(whole.student))


@pytest.mark.slow
def test_sigterm_ends_the_run_with_a_checkpoint(tmp_path: Path) -> None:
    told = in_a_process(tmp_path, "3", "SIGTERM")
    assert told.returncode == 0 and "ended at 3" in told.stdout, told.stderr
    assert list(checkpoints.find(tmp_path)) == [2, 3]


def test_only_the_last_checkpoints_are_kept(tmp_path: Path) -> None:
    trainer(tmp_path, config(save_every=1, keep=2)).run()
    assert list(checkpoints.find(tmp_path)) == [5, 6]
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-000005", "step-000006"]


def test_a_full_disk_leaves_the_former_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = trainer(tmp_path)
    run.run(until=3)

    def full(state: Any, path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space left"):
        run.run()
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000003"]


def test_a_loss_that_is_no_number_stops_the_run_before_the_update(tmp_path: Path) -> None:
    class Broken(Noise):
        def sample(self, index: int, generator: torch.Generator) -> Any:
            sample = super().sample(index, generator)
            return replace(sample, latents=sample.latents * (math.nan if index == 7 else 1))

    run = trainer(tmp_path, source=Broken())
    before = weights(run.student)
    for _ in range(6):
        try:
            before = weights(run.student)
            run.train_step()
        except FloatingPointError as error:
            assert f"the loss of step {run.step} is nan" in str(error)
            break
    else:
        pytest.fail("sample 7 never came")
    assert torch.equal(weights(run.student), before)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("file write failed\nstack")])
def test_a_full_disk_is_told_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def full(state: Any, path: Path) -> None:
        raise error

    run = trainer(tmp_path)
    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="cannot write the checkpoint .*step-000002: (No space|file write)") as told:
        run.run(until=2)
    assert "\n" not in str(told.value) and not any((tmp_path / "checkpoints").iterdir())


@pytest.mark.parametrize("optimizer", ["adamw", "prodigy"])
def test_settings_that_change_on_resume_hold_and_are_told(
    tmp_path: Path, optimizer: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The optimizer has what the config says, not what the checkpoint brings."""
    chosen = config(optimizer=optimizer)
    trainer(tmp_path, chosen).run(until=3)
    other = replace(chosen, weight_decay=0.25, betas=(0.5, 0.75), rate=chosen.rate / 2)
    again = trainer(tmp_path, other)
    again.run(resume=True, until=4)
    groups = again.optimizer.param_groups
    assert groups and all((group["weight_decay"], group["betas"]) == (0.25, (0.5, 0.75)) for group in groups)
    assert groups[0]["lr"] == other.rate_at(3)
    assert f"from step 3 on with other settings: rate {chosen.rate} -> {other.rate}; betas" in caplog.text
    assert f"weight_decay {chosen.weight_decay} -> 0.25" in caplog.text


def test_a_run_that_is_resumed_as_it_was_tells_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer(tmp_path).run(until=3)
    trainer(tmp_path).run(resume=True, until=4)
    assert "other settings" not in caplog.text


@pytest.mark.parametrize(("before", "after"), [(0.0, 0.9), (0.9, 0.0)])
def test_averages_neither_begin_nor_end_on_the_way(tmp_path: Path, before: float, after: float) -> None:
    trainer(tmp_path, config(ema=before)).run(until=3)
    with pytest.raises(ValueError, match=f"ema={before}, and this one has {after}: averaged weights"):
        trainer(tmp_path, config(ema=after)).run(resume=True)


def test_fewer_steps_than_are_done_are_refused(tmp_path: Path) -> None:
    trainer(tmp_path).run(until=5)
    with pytest.raises(ValueError, match="step-000005 is of step 5, and steps=4 end before it: give steps of at least"):
        trainer(tmp_path, config(steps=4)).run(resume=True)
    assert trainer(tmp_path, config(steps=5)).run(resume=True).finished


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


DAMAGE: dict[str, Any] = {
    "cut": lambda folder: cut(folder / "state.pt"),
    "empty": lambda folder: (folder / "state.pt").write_bytes(b""),
    "gone": lambda folder: (folder / "state.pt").unlink(),
    "a list": lambda folder: torch.save([1], folder / "state.pt"),
    "no optimizer": lambda folder: torch.save({"weights": {}, "average": [], "step": 3}, folder / "state.pt"),
    "another optimizer": lambda folder: change(folder, optimizer={"state": {}, "param_groups": []}),
    "other weights": lambda folder: change(folder, weights={"a": torch.ones(2)}),
    "NaN": lambda folder: change(folder, weights={"a": torch.tensor([math.nan])}),
    "step of text": lambda folder: change(folder, step="3"),
    "config cut": lambda folder: cut(folder / "config.json"),
    "config gone": lambda folder: (folder / "config.json").unlink(),
    "config of a list": lambda folder: (folder / "config.json").write_text("[1]"),
}


def change(folder: Path, **parts: Any) -> None:
    torch.save({**torch.load(folder / "state.pt", weights_only=True), **parts}, folder / "state.pt")


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_refused_in_one_line(tmp_path: Path, damage: str) -> None:
    trainer(tmp_path).run(until=3)
    folder = tmp_path / "checkpoints" / "step-000003"
    DAMAGE[damage](folder)
    run = trainer(tmp_path)
    before = weights(run.student)
    with pytest.raises(ValueError, match=str(tmp_path)) as error:
        run.resume()
    assert "\n" not in str(error.value)
    assert torch.equal(weights(run.student), before) and run.step == 0


def test_a_log_that_is_none_is_refused(tmp_path: Path) -> None:
    for text in ("step,total\none,2\n", "a,b\n1,2\n", "step,total\n1,2,3\n"):
        (tmp_path / LOG).write_text(text)
        with pytest.raises(ValueError, match=r"log\.csv is not the log of a run"):
            read_log(tmp_path / LOG)


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    trainer(tmp_path).run(until=3)
    with pytest.raises(ValueError, match="mechanism=clear\\(radius=2\\), and this one has agent"):
        trainer(tmp_path, config(mechanism=AgentAttention(num_agents=4))).run(resume=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention_layers": "nothing.*"}, "matches none of 4 swapped layers"),
        ({"attention_depths": ()}, "the attention loss has no layer"),
        ({"attention_depths": (1.5,)}, "attention_depths must be fractions from 0 to 1"),
        ({"trainable": "mechanism"}, "trains nothing: clear"),
        ({"trainable": "everything"}, "trainable must be"),
    ],
)
def test_bad_configs_leave_the_model_as_it_was(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, config(**changes))


def test_layers_of_the_loss_are_at_fractions_of_the_depth() -> None:
    chosen = config(attention_layers="single_*", attention_depths=(0, 1))
    student = make_student(flux_model(), chosen.mechanism)
    assert attention_layers(chosen, student) == (
        "single_transformer_blocks.0.attn",
        "single_transformer_blocks.2.attn",
    )


def test_mechanism_weights_alone_can_be_trained(tmp_path: Path) -> None:
    chosen = config(mechanism=LinearAttention(feature_map="learned"), trainable="mechanism")
    run = trainer(tmp_path, chosen)
    before = weights(run.student)
    assert run.student.projections == ()
    run.run()
    assert not torch.equal(weights(run.student), before)


@pytest.mark.parametrize("optimizer", ["adamw", "prodigy"])
def test_optimizers(tmp_path: Path, optimizer: str) -> None:
    rate = 1.0 if optimizer == "prodigy" else 1e-3
    chosen = config(optimizer=optimizer, rate=rate)
    whole = trainer(tmp_path / "a", chosen)
    whole.run()
    trainer(tmp_path / "b", chosen).run(until=3)
    again = trainer(tmp_path / "b", chosen)
    again.run(resume=True)
    assert torch.equal(weights(again.student), weights(whole.student))
