"""Processes that stay, each one rank of a group, to run functions of tests on.

    results = on_ranks(3, function, *arguments)      # function(mesh, *arguments) on ranks 0, 1 and 2

Starting a process takes seconds, so a pool of them is started once and serves every test of the session. A function is
named by its file and lies in a test module or beside it; arguments and results are pickled.

    python parallel_ranks.py <rank> <ranks> <rendezvous file>
"""

import importlib.util
import inspect
import os
import pickle
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
LEAST = 4
"""Ranks of a pool, unless more are asked for."""
IN_RANK = "DIFFATTN_TEST_RANK"
"""Set in the environment of a rank, which starts no others."""
TIMEOUT, GRACE = 120, 3
"""Seconds to wait for all ranks, and for the others once one has failed."""


class Pool:
    """`ranks` processes, waiting for work on their standard input."""

    def __init__(self, ranks: int) -> None:
        self.ranks, self.closed = ranks, False
        self._folder = tempfile.TemporaryDirectory()
        paths = os.pathsep.join([str(HERE.parent), str(HERE)])
        settings = {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "DIFFUSERS_ATTN_BACKEND": "native", IN_RANK: "1"}
        command = [sys.executable, str(Path(__file__).resolve())]
        self._processes = [
            subprocess.Popen(
                [*command, str(rank), str(ranks), f"{self._folder.name}/rendezvous"],
                env={**os.environ, **settings, "HF_HUB_OFFLINE": "1"},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
            )
            for rank in range(ranks)
        ]

    def run(self, ranks: int, function: Callable[..., Any], arguments: tuple[Any, ...]) -> list[Any]:
        """What the function returned on each of the first `ranks` ranks."""
        file = inspect.getfile(inspect.unwrap(function))
        work = pickle.dumps((ranks, file, function.__qualname__, arguments))
        answers: list[Any] = [None] * ranks
        readers = [threading.Thread(target=self._ask, args=(rank, work, answers), daemon=True) for rank in range(ranks)]
        for reader in readers:
            reader.start()
        until = time.monotonic() + TIMEOUT
        while any(reader.is_alive() for reader in readers) and time.monotonic() < until:
            time.sleep(0.002)
            if any(answer is not None and not answer[0] for answer in answers):
                until = min(until, time.monotonic() + GRACE)  # the others may wait for this rank forever
        failed = [(rank, answer) for rank, answer in enumerate(answers) if answer is None or not answer[0]]
        if any(answer is None for answer in answers):
            self.close()
        if failed:
            told = "\n".join(f"rank {rank}: {answer[1] if answer else 'no answer'}" for rank, answer in failed)
            raise AssertionError(f"{function.__qualname__} on {ranks} ranks\n{told}")
        return [answer[1] for answer in answers]

    def _ask(self, rank: int, work: bytes, answers: list[Any]) -> None:
        process = self._processes[rank]
        assert process.stdin is not None and process.stdout is not None
        pickle.dump(work, process.stdin)
        process.stdin.flush()
        try:
            answers[rank] = pickle.load(process.stdout)
        except (EOFError, pickle.UnpicklingError, ValueError):
            return

    def close(self) -> None:
        self.closed = True
        for process in self._processes:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                assert pipe is not None
                pipe.close()
        self._folder.cleanup()


_pools: list[Pool] = []


def on_ranks(ranks: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """`function(mesh, *arguments)` on every rank of a mesh of `ranks` real processes over gloo; their results."""
    if IN_RANK in os.environ:
        raise RuntimeError("a file whose functions run on ranks must not call on_ranks when it is loaded")
    if _pools and _pools[0].ranks < ranks:
        close_pools()
    if not _pools:
        _pools.append(Pool(max(ranks, LEAST)))
    try:
        return _pools[0].run(ranks, function, arguments)
    finally:
        if _pools[0].closed:
            _pools.clear()


def close_pools() -> None:
    """End the processes."""
    while _pools:
        _pools.pop().close()


def main(rank: int, ranks: int, rendezvous: str) -> None:
    import torch
    import torch.distributed as dist
    from torch.distributed.device_mesh import DeviceMesh

    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what anything prints must not get between the answers
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=ranks, timeout=timedelta(seconds=60)
    )
    meshes = {n: DeviceMesh("cpu", list(range(n)), mesh_dim_names=("frames",)) for n in range(1, ranks + 1)}
    modules: dict[str, Any] = {}
    while True:
        try:
            size, file, name, arguments = pickle.loads(pickle.load(sys.stdin.buffer))
        except EOFError:
            break
        try:
            if file not in modules:
                spec = importlib.util.spec_from_file_location(f"on_ranks_{len(modules)}", file)
                assert spec is not None and spec.loader is not None
                modules[file] = importlib.util.module_from_spec(spec)
                sys.modules[spec.name] = modules[file]
                spec.loader.exec_module(modules[file])
            torch.manual_seed(0)
            answer = True, getattr(modules[file], name)(meshes[size], *arguments)
        except Exception:
            answer = False, traceback.format_exc()
        pickle.dump(answer, answers)
        answers.flush()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
