"""One rank of a group that trains a toy, and how to start the group.

python train_ranks.py <rank> <ranks> <rendezvous file> <folder>
"""

import json
import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent


def run_ranks(folder: Path, ranks: int = 2, timeout: float = 240) -> list[dict[str, list[float]]]:
    """What each of `ranks` processes found."""
    paths = os.pathsep.join([str(HERE.parent), str(HERE)])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    processes = []
    for rank in range(ranks):
        command = [sys.executable, str(Path(__file__).resolve()), str(rank), str(ranks), str(folder)]
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


def main(rank: int, ranks: int, folder: Path) -> None:
    import torch
    import torch.distributed as dist
    from accelerate import Accelerator
    from diffattn.distill.student import make_student
    from diffattn.distill.trainer import Trainer
    from torch.nn.parallel import DistributedDataParallel
    from toys import Noise, config, flux_model, scheduler

    if ranks > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=ranks)
        # accelerate asks for all that torchrun sets; the group is there already, so the port is not used
        named = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_PORT": 29500}
        os.environ.update({name: str(value) for name, value in named.items()}, MASTER_ADDR="127.0.0.1")
    chosen = config(steps=20, batch_size=4, accumulation=2 // ranks)
    student = make_student(flux_model(), chosen.mechanism)
    trainer = Trainer(chosen, student, scheduler(), Noise(), folder / "run", Accelerator(cpu=True))
    assert trainer.accelerator.num_processes == ranks
    assert isinstance(trainer.model, DistributedDataParallel) == (ranks > 1)
    outcome = trainer.run()
    weights = torch.cat([weight.detach().flatten() for weight in student.parameters.values()])
    (folder / f"{rank}.json").write_text(json.dumps({"totals": outcome.totals, "weights": weights[::50].tolist()}))
    if ranks > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
