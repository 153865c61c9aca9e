"""What ends a run: silence, standing still, another rank's error."""

import json
import time
from collections.abc import Iterator

import pytest
import torch.distributed as dist
from diffattn.pipelines.long_video.run import watch
from diffattn.pipelines.long_video.run.watch import Watch


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in (("PERIOD", 0.05), ("LINGER", 0.05), ("MISSED", 0.5)):
        monkeypatch.setattr(watch, name, seconds)


@pytest.fixture
def store() -> Iterator[dist.TCPStore]:
    yield dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def wait(left: list[int], seconds: float = 10) -> None:
    until = time.monotonic() + seconds
    while not left and time.monotonic() < until:
        time.sleep(0.02)


def test_no_progress_ends_the_run(capfd: pytest.CaptureFixture[str]) -> None:
    left: list[int] = []
    with Watch(0, 1, None, 1.0, left.append) as one:
        one.at("step 3 of 20")
        wait(left)
    assert left == [1]
    assert "no progress for 1 s, rank 0 is in step 3 of 20" in capfd.readouterr().err


def test_a_silent_rank_is_named_with_its_last_place(store: dist.TCPStore, capfd: pytest.CaptureFixture[str]) -> None:
    left: list[int] = []
    store.set("rank-1", json.dumps([1, 1, "step 2 of 20"]))
    with Watch(0, 2, store, 1.0, left.append) as one:
        for step in range(200):
            one.at(f"step {step} of 200")
            time.sleep(0.02)
            if left:
                break
    assert left == [1]
    assert "rank 1 is dead or stopped, its last sign came in step 2 of 20" in capfd.readouterr().err


def test_the_error_of_a_rank_ends_the_others(store: dist.TCPStore, capfd: pytest.CaptureFixture[str]) -> None:
    left: list[int] = []
    store.set("failed", "rank 1, step 2 of 20: OSError: disk full")
    with Watch(0, 2, store, 30.0, left.append):
        wait(left)
    assert left == [1]
    assert "rank 0 ends: rank 1, step 2 of 20: OSError: disk full" in capfd.readouterr().err


def test_an_error_is_told_with_rank_and_step(store: dist.TCPStore) -> None:
    with Watch(1, 2, store, 30.0, lambda code: None) as one:
        one.at("step 4 of 20")
        assert one.failed(OSError("disk full")) == "rank 1, step 4 of 20: OSError: disk full"
    assert store.get("failed").decode() == "rank 1, step 4 of 20: OSError: disk full"


def test_progress_keeps_a_run_alive() -> None:
    left: list[int] = []
    with Watch(0, 1, None, 1.0, left.append) as one:
        for _ in range(15):
            one.at("a step")
            time.sleep(0.1)
    assert left == []
