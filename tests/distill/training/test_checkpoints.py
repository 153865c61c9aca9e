"""Checkpoints of training: only their own files are removed."""

from pathlib import Path

from diffattn.distill.config import DistillConfig
from diffattn.distill.training import checkpoints

from diffattn import ClearAttention


def test_files_of_others_in_a_checkpoint_stay(tmp_path: Path) -> None:
    config = DistillConfig(model="tiny", mechanism=ClearAttention(radius=2))
    first = checkpoints.write(tmp_path, 1, {}, config, keep=1)
    (first / "notes.txt").write_text("mine")
    checkpoints.write(tmp_path, 2, {}, config, keep=1)
    assert [file.name for file in first.iterdir()] == ["notes.txt"]
    assert list(checkpoints.find(tmp_path)) == [2]
