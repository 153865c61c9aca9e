"""Images and cache by several processes, as torchrun and `accelerate launch` start them."""

import io
import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Sequence
from pathlib import Path

import pytest
from diffattn.distill.data.cache_facts import FACTS, LATENTS, PROMPT
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]


def together(*arguments: str, ranks: Sequence[int] = (0, 1)) -> list[str]:
    """What these of the two processes of one command print, all started at once."""
    running = [
        subprocess.Popen(
            [sys.executable, "-m", "diffattn.distill", *arguments],
            cwd=ROOT,
            env={**os.environ, "RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in ranks
    ]
    answers = [process.communicate(timeout=300) for process in running]
    assert [process.returncode for process in running] == [0] * len(ranks), answers
    return [said for said, _ in answers]


@pytest.mark.dist
@pytest.mark.slow
def test_two_processes_make_and_cache_one_folder(tmp_path: Path) -> None:
    prompts, folder = tmp_path / "prompts.json", tmp_path / "pictures"
    prompts.write_text(json.dumps(["a red circle", "a blue ring", "a green square"]))
    said = together("generate", "tiny", str(prompts), "--output", str(folder))
    assert ["done=2" in said[0], "done=1" in said[1]] == [True, True]
    assert len(list(folder.glob("*.png"))) == 3
    said = together("cache", "tiny", str(folder), "--size", "64x64")
    assert "done=2" in said[0] and "process 0 of 2" in said[0] and "done=1" in said[1]
    assert len(list(folder.glob(f"*{LATENTS}"))) == len(list(folder.glob(f"*{PROMPT}"))) == 3


def picture(colour: str) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (64, 64), colour).save(file, "PNG")
    return file.getvalue()


def write_shard(path: Path, files: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as shard:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            shard.addfile(member, io.BytesIO(data))


@pytest.mark.dist
@pytest.mark.slow
def test_two_processes_cache_shards(tmp_path: Path) -> None:
    for number, second in enumerate((b"none", picture("blue"))):
        files = {"0.png": picture("red"), "0.txt": b"red", "1.png": second, "1.txt": b"blue"}
        write_shard(tmp_path / f"data-{number:03d}.tar", files)
    folder = tmp_path / "pictures"
    arguments = ("cache", "tiny", str(folder), "--size", "64x64", "--shards", f"{tmp_path}/data-{{000..001}}.tar")
    said = "".join(together(*arguments))
    assert said.count("done=") == 2 and "corrupt=1" in said
    assert sorted(path.relative_to(folder).as_posix() for path in folder.rglob(f"*{LATENTS}")) == [
        f"data-{name}{LATENTS}" for name in ("000/0", "001/0", "001/1")
    ]
    assert (folder / FACTS).is_file()
    assert "skipped=2" in together(*arguments, ranks=[0])[0]
