"""What the teacher said is asked once: the same numbers, from disk, after a kill as well."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffattn.distill.data.samples import collate, places
from diffattn.distill.objective import add_noise
from diffattn.distill.student import make_student
from diffattn.distill.training.listening import Said
from diffattn.distill.training.losses import LossWeights
from diffattn.distill.training.teacher_memory import TeacherMemory, fingerprint, named, unnamed
from diffattn.distill.training.trainer import Trainer
from toys import Noise, config, flux_model, scheduler

ALL = LossWeights(target=1.0, prediction=0.5, attention=0.5, features=0.5)


def trainer(folder: Path, **changes: Any) -> Trainer:
    values: dict[str, Any] = {"noises": 2, "teacher_cache": 1.0, "loss": ALL, "steps": 14}
    chosen = config(**{**values, **changes})
    return Trainer(chosen, make_student(flux_model(), chosen.mechanism), scheduler(), Noise(), folder)


def weights(run: Trainer) -> torch.Tensor:
    return torch.cat([weight.detach().flatten() for weight in run.student.parameters.values()])


def counted(run: Trainer) -> list[int]:
    """The steps at which the teacher was asked, as they come."""
    asked: list[int] = []
    own = run.student.teacher

    def teacher() -> Any:
        asked.append(run.step)
        return own()

    object.__setattr__(run.student, "teacher", teacher)
    return asked


def test_noises_recur_with_their_sample() -> None:
    source, batches = Noise(count=5), [[collate(Noise(count=5), [place], 7, noises) for place in range(20)]
                                       for noises in (0, 1, 2)]  # fmt: skip
    for noises, found in zip((0, 1, 2), batches, strict=True):
        drawn = {tuple(batch.noise.flatten()[:2].tolist()) for batch in found}
        assert len(drawn) == (20 if noises == 0 else 5 * noises)
        assert {batch.numbers for batch in found} == (
            {()} if noises == 0 else {(number,) for number in range(5 * noises)}
        )
    both = collate(source, [3, 17], 7, 1)
    assert torch.equal(both.noise[0], collate(source, [3], 7, 1).noise[0])


def test_the_teacher_is_asked_once_for_each_noise_and_the_run_is_the_same(tmp_path: Path) -> None:
    kept, plain = trainer(tmp_path / "kept"), trainer(tmp_path / "plain", teacher_cache=0.0)
    asked = counted(kept)
    totals, other = kept.run().totals, plain.run().totals
    assert max(asked) < 6 and len(asked) == 6  # 11 samples with two noises, 4 a step
    assert totals == pytest.approx(other, rel=1e-4)
    assert not (tmp_path / "kept" / "teacher").exists()


def test_a_resumed_run_reads_what_was_kept_and_ends_bit_for_bit(tmp_path: Path) -> None:
    whole = trainer(tmp_path / "whole")
    whole.run()
    trainer(tmp_path / "cut").run(until=8)
    files = sorted((tmp_path / "cut" / "teacher").iterdir())
    assert len(files) == 22
    again = trainer(tmp_path / "cut")
    asked = counted(again)
    again.run(resume=True)
    assert not asked
    assert torch.equal(weights(again), weights(whole))
    assert not (tmp_path / "cut" / "teacher").exists()


def test_what_has_no_room_is_asked_again_and_files_of_others_stay(tmp_path: Path) -> None:
    once = trainer(tmp_path / "once")
    once.run(until=6)
    size = max(file.stat().st_size for file in (tmp_path / "once" / "teacher").iterdir())
    few = trainer(tmp_path / "few", teacher_cache=5.5 * size / 2**30)
    asked = counted(few)
    few.run(until=12)
    assert len(list((tmp_path / "few" / "teacher").iterdir())) == 5
    assert len(asked) == 12
    (tmp_path / "few" / "teacher" / "mine.txt").write_text("")
    few.run()
    assert [file.name for file in (tmp_path / "few" / "teacher").iterdir()] == ["mine.txt"]


def test_kept_words_count_though_the_rest_of_the_batch_is_asked_for(tmp_path: Path) -> None:
    memory = TeacherMemory(tmp_path, 1.0, ("model",))
    batch = collate(Noise(), places(0, 4, 0, 1), 0, 1)
    noised = add_noise(scheduler(), batch)
    first = memory.ask(batch, noised, lambda: Said(torch.arange(4.0)[:, None], (torch.ones(8, 2),)))
    assert torch.equal(first.prediction, torch.arange(4.0)[:, None]) and first.attention[0].shape == (8, 2)
    file = sorted(tmp_path.iterdir())[0]
    number = int(file.name.split("-")[0])
    place = batch.numbers.index(number)
    file.unlink()
    second = memory.ask(batch, noised, lambda: Said(torch.full((4, 1), 9.0), (torch.ones(8, 2),)))
    want = torch.arange(4.0)[:, None]
    want[place] = 9
    assert torch.equal(second.prediction, want)


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    trainer(tmp_path).run(until=4)
    file = sorted((tmp_path / "teacher").iterdir())[0]
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ValueError, match=f"{file.name} is damaged .*: remove it, and the same command goes on"):
        trainer(tmp_path).run(resume=True)
    file.unlink()
    assert trainer(tmp_path).run(resume=True).finished


def test_another_question_or_other_data_has_other_files(tmp_path: Path) -> None:
    batch = collate(Noise(), places(0, 4, 0, 1), 0, 1)
    noised = add_noise(scheduler(), batch)
    for question in ("one", "two"):
        TeacherMemory(tmp_path, 1.0, (question,)).ask(batch, noised, lambda: Said(torch.zeros(4, 1)))
    assert len(list(tmp_path.iterdir())) == 8
    batch.conditioning["pooled_projections"][0] += 1
    TeacherMemory(tmp_path, 1.0, ("two",)).ask(batch, noised, lambda: Said(torch.zeros(4, 1)))
    assert len(list(tmp_path.iterdir())) == 9


def test_other_weights_have_another_fingerprint() -> None:
    model, other = flux_model(), flux_model()
    assert fingerprint(model) == fingerprint(other)
    with torch.no_grad():
        other.single_transformer_blocks[1].attn.to_q.weight[0, 3] += 1e-6
    assert fingerprint(model) != fingerprint(other)


def test_names_lead_back() -> None:
    said = Said(torch.zeros(1), (torch.ones(1), torch.ones(2)), (torch.zeros(3),))
    again = unnamed(dict(reversed(named(said).items())))
    assert [t.shape for t in (again.prediction, *again.attention, *again.features)] == [(1,), (1,), (2,), (3,)]


def test_bfloat16_words_are_kept_in_their_dtype(tmp_path: Path) -> None:
    batch = collate(Noise(), places(0, 2, 0, 1), 0, 1)
    noised = add_noise(scheduler(), batch)
    memory = TeacherMemory(tmp_path, 1.0, ())
    for _ in range(2):
        said = memory.ask(batch, noised, lambda: Said(torch.ones(2, 3, dtype=torch.bfloat16)))
        assert said.prediction.dtype == torch.bfloat16
