import json

import pytest
import torch
from diffattn.pipelines.video_sr.clips.store import FolderStore, MemoryStore
from torch import Tensor


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=["memory", "folder"])
def store(request, tmp_path):
    return MemoryStore() if request.param == "memory" else FolderStore(tmp_path / "new" / "work")


def test_blocks_make_a_clip(store):
    clip = draw(7, 4, 3, 5)
    for begin, end in ((0, 3), (3, 4), (4, 7)):
        store.write("x.0", begin, clip[begin:end])
    assert torch.equal(store.read("x.0", 0, 7), clip) and torch.equal(store.read("x.0", 2, 6), clip[2:6])
    assert store.read("x.0", 6, 7).shape == (1, 4, 3, 5)


def test_entries_are_apart_and_may_differ_in_shape(store):
    store.write("hint", 0, draw(2, 4, 3, 5))
    store.write("x0.1", 0, draw(2, 3))
    store.write("x.1", 0, draw(2, 3, seed=1))
    assert torch.equal(store.read("x0.1", 0, 2), draw(2, 3)) and store.read("hint", 0, 1).shape == (1, 4, 3, 5)


def test_frames_are_written_again(store):
    store.write("x", 0, draw(5, 2))
    store.write("x", 1, draw(2, 2, seed=1))
    got = store.read("x", 0, 5)
    assert torch.equal(got[1:3], draw(2, 2, seed=1)) and torch.equal(got[[0, 3, 4]], draw(5, 2)[[0, 3, 4]])


def test_what_is_read_is_a_copy_and_so_is_what_was_written(store):
    clip = draw(3, 2)
    store.write("x", 0, clip)
    clip.zero_()
    store.read("x", 0, 3).zero_()
    assert torch.equal(store.read("x", 0, 3), draw(3, 2))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_everything_is_float32(store, dtype):
    clip = draw(2, 3, 2).to(dtype)
    store.write("x", 0, clip.transpose(1, 2))
    assert store.read("x", 0, 2).dtype == torch.float32
    assert torch.equal(store.read("x", 0, 2), clip.transpose(1, 2).float())


def test_a_dropped_entry_is_gone_and_may_have_another_shape(store):
    store.write("x", 0, draw(3, 2))
    store.drop("x")
    store.drop("x")
    with pytest.raises(ValueError, match="frames 0 to 1 of 'x'"):
        store.read("x", 0, 1)
    store.write("x", 0, draw(3, 4))
    assert store.read("x", 0, 3).shape == (3, 4)


def test_frames_that_were_not_written_are_told(store):
    store.write("x", 0, draw(3, 2))
    for name, begin, end in (("y", 0, 1), ("x", 2, 4), ("x", 3, 4), ("x", 1, 1)):
        with pytest.raises(ValueError, match=f"^expected frames {begin} to {end} of '{name}'; got .*; write them"):
            store.read(name, begin, end)


def test_another_shape_is_refused(store):
    store.write("x", 0, draw(3, 2))
    for frames in (draw(1, 3), draw(1, 2, 1), draw(0, 2)):
        with pytest.raises(ValueError, match=r"^expected frames of \(2,\) for 'x'.*; got \("):
            store.write("x", 3, frames)
    assert torch.equal(store.read("x", 0, 3), draw(3, 2))


def test_a_folder_outlives_its_store(tmp_path):
    FolderStore(tmp_path).write("x.3", 0, draw(3, 2, 2))
    other = FolderStore(tmp_path)
    assert torch.equal(other.read("x.3", 1, 3), draw(3, 2, 2)[1:])
    assert sorted(file.name for file in tmp_path.iterdir()) == ["x.3.f32", "x.3.json"]
    assert (tmp_path / "x.3.f32").stat().st_size == 3 * 4 * 4
    other.drop("x.3")
    assert not list(tmp_path.iterdir())


def test_an_entry_cut_off_before_its_shape_was_noted_is_begun_anew(tmp_path):
    (tmp_path / "x.f32").write_bytes(b"leftover" * 100)
    store = FolderStore(tmp_path)
    with pytest.raises(ValueError, match="got no such entry"):
        store.read("x", 0, 1)
    store.write("x", 0, draw(2, 2))
    assert (tmp_path / "x.f32").stat().st_size == 16 and json.loads((tmp_path / "x.json").read_text()) == [2]
