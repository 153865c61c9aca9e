"""One rank of a group that trains toys, and how to start the group.

python train_ranks.py <rank> <ranks> <folder> <cases, JSON: name -> changes of the config>
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent


Cases = dict[str, dict[str, Any]]


def run_ranks(folder: Path, ranks: int, cases: Cases, timeout: float = 400) -> list[Cases]:
    """What each of `ranks` processes found in every case; a case trains in the folder of its name."""
    (folder / "rendezvous").unlink(missing_ok=True)
    paths = os.pathsep.join([str(HERE.parent), str(HERE)])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    processes = []
    for rank in range(ranks):
        command = [sys.executable, str(Path(__file__).resolve()), str(rank), str(ranks), str(folder)]
        command.append(json.dumps(cases))
        processes.append(
            subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        )
    try:
        for rank, process in enumerate(processes):
            output, _ = process.communicate(timeout=timeout)
            assert process.returncode == 0, f"rank {rank}:\n{output}"
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(ranks)]


def main(rank: int, ranks: int, folder: Path, cases: Cases) -> None:
    import torch.distributed as dist

    from diffattn.parallel.operations.collectives import leave_group

    if ranks > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=ranks)
        # accelerate asks for all that torchrun sets; the group is there already, so the port is not used
        named = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_PORT": 29500}
        os.environ.update({name: str(value) for name, value in named.items()}, MASTER_ADDR="127.0.0.1")
    found = train_all(ranks, folder, cases)
    (folder / f"{rank}.json").write_text(json.dumps(found))
    leave_group()


def train_all(ranks: int, folder: Path, cases: Cases) -> Cases:
    """What this process found in every case."""
    return {name: train(ranks, folder / name, **changes) for name, changes in cases.items()}


def train(
    ranks: int, folder: Path, *, until: int | None = None, resume: bool = False, **changes: Any
) -> dict[str, Any]:
    import torch
    from accelerate import Accelerator
    from diffattn.distill.config import from_dict
    from diffattn.distill.student import make_student
    from diffattn.distill.training.sharding import is_sharded, whole
    from diffattn.distill.training.trainer import Trainer
    from torch.nn.parallel import DistributedDataParallel
    from toys import Noise, config, flux_model, scheduler

    chosen = from_dict(changes, config(steps=20, batch_size=4, accumulation=2 // ranks))
    model = flux_model()
    student = make_student(
        model,
        chosen.mechanism,
        trainable=chosen.trainable,
        settings=chosen.settings if chosen.drawn else (),
        leaning=chosen.drawn if chosen.slopes else None,
    )
    trainer = Trainer(chosen, student, scheduler(), Noise(), folder, Accelerator(cpu=True))
    assert trainer.accelerator.num_processes == ranks
    outcome = trainer.run(until=until, resume=resume)
    weights = torch.cat([whole(weight).flatten() for weight in student.parameters.values()])
    own = dict(model.named_parameters())
    return {
        "totals": outcome.totals,
        "weights": weights[:: max(1, len(weights) // 500)].tolist(),
        "wrapped": isinstance(trainer.model, DistributedDataParallel),
        "sharded": sum(is_sharded(weight) for weight in own.values()),
        "whole": sum(not is_sharded(weight) for weight in own.values()),
        "held": sum((weight.to_local() if is_sharded(weight) else weight).numel() for weight in own.values()),
        "class": type(model).__name__,
    }


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), json.loads(sys.argv[4]))
