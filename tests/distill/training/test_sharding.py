"""Weights in shards over real processes: the same curve as one process, and an error where nothing would be sharded."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.utils import DistributedType
from diffattn.distill.training.sharding import average_gradients, blocks_of, check_processes, clip_gradients
from toys import config, flux_model
from train_ranks import Cases, run_ranks, train_all

TESTS = Path(__file__).resolve().parents[2]


LEARNED = {"mechanism": {"type": "linear", "feature_map": "learned"}, "steps": 6}
CASES: Cases = {
    "clear": {},
    "linear": LEARNED,
    "mechanism": {**LEARNED, "trainable": "mechanism"},
    "prodigy": {"optimizer": "prodigy", "rate": 1.0, "trainable": "lora", "steps": 6, "gradient_checkpointing": True},
}
CASES["leaning"] = {"drawn": {"radius": [1.5, 2, 3]}, "slopes": True, "loss": {"features": 0.5}, "steps": 6}
WHOLE: Cases = {"by layers": {"layerwise": 3, "steps": 6}}
"""What takes no shards."""
CUT = {"ema": 0.9}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Cases]]:
    """One process (this one), then two, then one again; the case "cut" goes from hand to hand."""
    folder = tmp_path_factory.mktemp("ranks")
    alone = [train_all(1, folder, {**CASES, **WHOLE, "cut": {**CUT, "until": 6}})]
    cut = {**CUT, "resume": True}
    shards = {f"{name} in shards": {**changes, "sharded": True} for name, changes in CASES.items()}
    both = run_ranks(folder, 2, {**CASES, **WHOLE, **shards, "cut": {**cut, "until": 12, "sharded": True}})
    return {"one": alone, "two": both, "again": [train_all(1, folder, {"cut": cut})]}


@pytest.mark.dist
@pytest.mark.parametrize(
    ("case", "form"), [*((case, form) for case in CASES for form in ("", " in shards")), ("by layers", "")]
)
@pytest.mark.slow
def test_processes_follow_the_curve_of_one(found: dict[str, list[Cases]], case: str, form: str) -> None:
    [one] = found["one"]
    for both in found["two"]:
        own = both[case + form]
        assert len(own["totals"]) == {**CASES, **WHOLE}[case].get("steps", 20)
        assert own["totals"] == pytest.approx(one[case]["totals"], abs=1e-4)
        assert own["weights"] == pytest.approx(one[case]["weights"], abs=1e-4)
        # a mechanism's own weights lie outside the model, which then has nothing to wrap
        assert own["wrapped"] == (form == "" and case != "mechanism")


@pytest.mark.dist
@pytest.mark.slow
def test_a_sharded_model_has_only_dtensors_half_of_them_here(found: dict[str, list[Cases]]) -> None:
    [one] = found["one"]
    for both in found["two"]:
        own = both["clear in shards"]
        assert own["whole"] == 0 and own["sharded"] == one["clear"]["whole"] > 50
        assert own["held"] <= 0.51 * one["clear"]["held"]
        assert own["class"] == "FSDPFluxTransformer2DModel"


@pytest.mark.dist
def test_a_run_goes_on_in_shards_and_back_in_one_process(found: dict[str, list[Cases]]) -> None:
    parts = [found["one"][0]["cut"], found["two"][1]["cut"], found["again"][0]["cut"]]
    [one] = found["one"]
    assert [len(part["totals"]) for part in parts] == [6, 6, 8]
    assert [total for part in parts for total in part["totals"]] == pytest.approx(one["clear"]["totals"], abs=1e-4)
    assert parts[-1]["weights"] == pytest.approx(one["clear"]["weights"], abs=1e-4)


def processes(kind: DistributedType = DistributedType.MULTI_CPU, count: int = 2, stage: int = 2) -> Any:
    plugin = SimpleNamespace(zero_stage=stage)
    return SimpleNamespace(distributed_type=kind, num_processes=count, deepspeed_plugin=plugin)


@pytest.mark.parametrize(
    ("changes", "accelerator", "message"),
    [
        ({"sharded": True}, processes(count=1), "there is one: start several"),
        ({"sharded": True, "precision": "fp16"}, processes(), "no gradient scaling"),
        ({"sharded": True}, processes(DistributedType.DEEPSPEED), "choose one"),
        ({}, processes(DistributedType.DEEPSPEED, stage=3), "ZeRO stage 3"),
        ({}, processes(DistributedType.FSDP), "set sharded=true"),
        ({"sharded": True}, processes(DistributedType.FSDP), "launch without --use_fsdp"),
    ],
)
def test_what_would_not_take_effect_is_refused(changes: Any, accelerator: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_processes(config(**changes), accelerator)


def test_accelerates_own_sharding_is_refused_where_it_would_be_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    check_processes(config(), processes())
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="set sharded=true, which shards by fully_shard"):
        check_processes(config(), processes())
    check_processes(config(sharded=True), processes())


@pytest.mark.slow
def test_one_process_that_asks_for_shards_stops_before_training() -> None:
    script = """
from pathlib import Path
from toys import Noise, config, flux_model, scheduler
from diffattn.distill.student import make_student
from diffattn.distill.training.trainer import Trainer
chosen = config(sharded=True)
Trainer(chosen, make_student(flux_model(), chosen.mechanism), scheduler(), Noise(), Path("."))
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)]), "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert ended.returncode == 1 and "sharded=true splits the weights over processes" in ended.stderr


def test_blocks_are_the_members_of_a_models_lists() -> None:
    model = flux_model()
    assert blocks_of(model) == [*model.transformer_blocks, *model.single_transformer_blocks]


def test_gradients_of_one_process_are_clipped_and_left_alone() -> None:
    weights = [torch.nn.Parameter(torch.zeros(3)), torch.nn.Parameter(torch.zeros(2, 2))]
    for weight in weights:
        weight.grad = torch.full_like(weight, 2.0)
    average_gradients(weights)
    norm = clip_gradients(weights, 1.0)
    assert float(norm) == pytest.approx(2 * 7**0.5)
    left = torch.cat([weight.grad.flatten() for weight in weights if weight.grad is not None])
    assert float(left.norm()) == pytest.approx(1.0, abs=1e-5)
    clip_gradients(weights, float("inf"))
    assert float(left.norm()) == pytest.approx(1.0, abs=1e-5)


MEMORY = """
import copy, json, re, sys
from pathlib import Path
import torch
from accelerate import Accelerator
from diffusers import FluxTransformer2DModel
from toys import Noise, POOLED, WIDTH, config, scheduler
import diffattn.distill.training.trainer as trainer_module
from diffattn.distill.student import make_student
from diffattn.distill.training.trainer import Trainer

torch.manual_seed(0)
model = FluxTransformer2DModel(
    patch_size=1, in_channels=16, num_layers=2, num_single_layers=4, attention_head_dim=64, num_attention_heads=16,
    joint_attention_dim=WIDTH, pooled_projection_dim=POOLED, axes_dims_rope=(16, 24, 24),
)
chosen = config(steps=2, batch_size=1, save_every=1000)
copied = sys.argv[1] == "copies"
teacher = copy.deepcopy(model).requires_grad_(False) if copied else None
student = make_student(model, chosen.mechanism)
originals = student.originals.bytes
if copied:
    student.originals.give_back()
    student.originals._modules.clear()
    own = trainer_module.predict
    trainer_module.predict = lambda m, *rest: own(m if torch.is_grad_enabled() else teacher, *rest)
trainer = Trainer(chosen, student, scheduler(), Noise(), Path(sys.argv[2]), Accelerator(cpu=True))
if copied:
    trainer.attention.__class__.outputs = property(lambda self: [torch.zeros(1) for _ in self.names])
for _ in range(2):
    trainer.train_step()
# not `ru_maxrss`, which begins with the peak of the process that started this one
peak = int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
print(json.dumps({"peak": peak, "model": sum(p.nbytes for p in model.parameters()), "originals": originals}))
"""


@pytest.mark.slow
def test_the_shared_teacher_saves_what_the_weights_predict(tmp_path: Path) -> None:
    """Peak memory of two real runs of a model of half a GB: one with a copy as teacher, one with the shared weights."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)]), "OMP_NUM_THREADS": "1"}
    environment["MALLOC_MMAP_THRESHOLD_"] = "65536"  # what is freed goes back at once

    def peak(kind: str) -> dict[str, int]:
        command = [sys.executable, "-c", MEMORY, kind, str(tmp_path)]
        ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
        assert ended.returncode == 0, ended.stderr
        return dict(json.loads(ended.stdout.splitlines()[-1]))

    shared, copies = peak("shared"), peak("copies")
    predicted = copies["model"] - shared["originals"]
    assert predicted > 3e8
    assert copies["peak"] - shared["peak"] == pytest.approx(predicted, rel=0.1)
