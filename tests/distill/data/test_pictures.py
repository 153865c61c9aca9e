"""Images with captions: every form of caption, and what is said of what can't be used."""

import io
import json
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from diffattn.distill.data.pictures import (
    Counts,
    find_pictures,
    find_shards,
    load_picture,
    named,
    own_place,
    read_shards,
    share,
    unpack_shards,
)
from PIL import Image

from diffattn.media.pictures import read_picture


def picture(colour: str = "red", size: tuple[int, int] = (8, 6), form: str = "PNG") -> bytes:
    """A plain picture's file; `size` is (width, height)."""
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, form)
    return file.getvalue()


def write(folder: Path, files: dict[str, str | bytes]) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def write_shard(path: Path, files: dict[str, str | bytes]) -> Path:
    with tarfile.open(path, "w") as shard:
        for name, content in files.items():
            data = content if isinstance(content, bytes) else content.encode()
            member = tarfile.TarInfo(name)
            member.size = len(data)
            shard.addfile(member, io.BytesIO(data))
    return path


CAPTIONS: dict[str, dict[str, str | bytes]] = {
    "json, prompt": {"a.json": '{"prompt": "one"}'},
    "json, caption": {"a.json": '{"caption": "one", "seed": 3}'},
    "txt": {"a.txt": "one\n"},
    "txt with a byte order mark": {"a.txt": b"\xef\xbb\xbfone"},
    "json before txt": {"a.json": '{"prompt": "one"}', "a.txt": "two"},
    "json that says nothing": {"a.json": '{"seed": 3}', "a.txt": "one"},
    "json that is blank": {"a.json": '{"prompt": " "}', "a.txt": "one"},
    "jsonl, text": {"metadata.jsonl": '{"file_name": "a.png", "text": "one"}\n\n'},
    "jsonl, caption": {"metadata.jsonl": '{"file_name": "a.png", "caption": "one"}'},
    "list of entries": {"metadata.json": '[{"file_name": "a.png", "prompt": "one"}]'},
    "own file before the list": {"a.txt": "one", "metadata.json": '[{"file_name": "a.png", "prompt": "two"}]'},
}


@pytest.mark.parametrize("captions", CAPTIONS.values(), ids=CAPTIONS)
def test_a_caption_is_found(captions, tmp_path):
    (found,) = find_pictures(write(tmp_path, {"a.png": picture(), **captions}))
    assert (found.name, found.path, found.caption) == ("a", tmp_path / "a.png", "one")


def test_folders_are_searched_in_order_and_all_endings_count(tmp_path):
    names = ["b/2.v2.jpeg", "a/1.JPG", "c.webp", "b/1.png"]
    files: dict[str, str | bytes] = {name: picture() for name in names}
    files |= {f"{name.rpartition('.')[0]}.txt": f"caption of {name}" for name in names}
    found = find_pictures(write(tmp_path, files))
    assert [one.name for one in found] == ["a/1", "b/1", "b/2.v2", "c"]
    assert [one.caption for one in found] == [f"caption of {one.path.relative_to(tmp_path)}" for one in found]


def test_file_names_of_a_list_are_relative_to_it(tmp_path):
    entry = json.dumps({"file_name": "./deep/a.png", "text": "one\u2028line"}, ensure_ascii=False)
    (found,) = find_pictures(write(tmp_path, {"train/deep/a.png": picture(), "train/metadata.jsonl": entry}))
    assert (found.name, found.caption) == ("train/deep/a", "one\u2028line")


def test_hidden_files_are_left_out(tmp_path):
    files = {"a.png": picture(), "a.txt": "one", ".b-x7.png": b"half", ".trash/c.png": picture()}
    assert [one.name for one in find_pictures(write(tmp_path, files))] == ["a"]


def test_entries_without_a_picture_are_named(tmp_path, caplog):
    lines = "\n".join(f'{{"file_name": "{name}.png", "text": "one"}}' for name in "abc")
    find_pictures(write(tmp_path, {"a.png": picture(), "metadata.jsonl": lines}))
    assert "2 (b.png, c.png)" in caplog.text


def test_pictures_without_a_caption_are_named_and_counted(tmp_path):
    files: dict[str, str | bytes] = {f"{number}.png": picture() for number in range(6)}
    with pytest.raises(ValueError, match=r"5 \(0.png, 1.png, 3.png, ...\).*NAME.txt"):
        find_pictures(write(tmp_path, {**files, "2.txt": "two", "3.txt": " \n"}))


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"a.txt": "one"}, "got none"),
        ({"a.png": picture(), "a.jpg": picture(), "a.txt": "one"}, "a.jpg and a.png would share"),
        ({"a.png": picture(), "a.json": '{"prompt": '}, "a.json is not JSON"),
        ({"a.png": picture(), "a.txt": b"\xff\xfe\x00"}, "a.txt is not UTF-8"),
        ({"a.png": picture(), "metadata.json": '{"a.png": "one"}'}, "file_name"),
        ({"a.png": picture(), "metadata.jsonl": '{"image": "a.png"}'}, "file_name"),
    ],
)
def test_what_cannot_be_used_is_said(files, said, tmp_path):
    with pytest.raises(ValueError, match=said):
        find_pictures(write(tmp_path, files))


def test_an_absent_folder_is_said(tmp_path):
    with pytest.raises(ValueError, match="nowhere"):
        find_pictures(tmp_path / "nowhere")


def test_a_picture_is_covered_and_cropped_at_its_centre(tmp_path):
    # red | green | blue, 3 wide and 1 high: a square of it is the green part.
    pixels = np.repeat(np.eye(3, dtype=np.uint8)[None] * 255, 40, axis=1).repeat(40, axis=0)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    square = load_picture(tmp_path / "a.png", (20, 20))
    assert square.dtype == torch.float32 and square.is_contiguous()
    assert torch.equal(square[:, 10, 10], torch.tensor([-1.0, 1.0, -1.0]))
    assert square[1].mean() > 0.9
    wide = load_picture(tmp_path / "a.png", (16, 48))
    assert wide.shape == (3, 16, 48)
    assert torch.equal(wide[:, 8, [2, 24, 45]], 2 * torch.eye(3) - 1)


def test_a_picture_is_turned_as_its_camera_was_held(tmp_path):
    turned = Image.Exif()
    turned[0x0112] = 6  # orientation: the top is at the right
    Image.fromarray(np.repeat(np.array([[0, 255]], dtype=np.uint8), 8, axis=1).repeat(16, axis=0)).save(
        tmp_path / "a.png", exif=turned
    )
    upright = load_picture(tmp_path / "a.png", (16, 16))
    assert upright[0, 2].max() == -1 and upright[0, 13].min() == 1


@pytest.mark.parametrize("mode", ["L", "RGBA", "CMYK", "1"])
def test_every_kind_of_picture_becomes_rgb(mode):
    file = io.BytesIO()
    Image.new(mode, (9, 9)).save(file, "TIFF")
    assert load_picture(file, (4, 6)).shape == (3, 4, 6)


def test_all_levels_of_16_bit_gray_come_through(tmp_path):
    levels = np.arange(128, dtype=np.uint16).repeat(2).reshape(16, 16) * 512
    Image.fromarray(levels).save(tmp_path / "a.png")
    got = load_picture(tmp_path / "a.png", (16, 16))
    assert len(got.unique()) == 128
    want = torch.from_numpy(read_picture(tmp_path / "a.png").pixels).permute(2, 0, 1) / 127.5 - 1
    assert torch.equal(got, want)


def test_what_is_clear_becomes_white(tmp_path):
    pixels = np.zeros((8, 6, 4), dtype=np.uint8)
    pixels[:, :3, 3] = 255  # black at the left, clear at the right
    Image.fromarray(pixels).save(tmp_path / "a.png")
    got = load_picture(tmp_path / "a.png", (8, 6))
    assert got[:, :, :3].max() == -1 and got[:, :, 3:].min() == 1
    Image.fromarray(pixels).quantize().save(tmp_path / "b.png")  # a palette with one clear colour
    assert torch.equal(load_picture(tmp_path / "b.png", (8, 6)), got)


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP"])
def test_a_truncated_picture_is_named(form, tmp_path):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))
    file = io.BytesIO()
    noise.save(file, form)
    (tmp_path / "a.png").write_bytes(file.getvalue()[: len(file.getvalue()) // 2])
    with pytest.raises(ValueError, match="a.png is not a whole image"):
        load_picture(tmp_path / "a.png", (8, 8))


def test_shares_cover_everything_once():
    parts = [share(range(11), rank, 3) for rank in range(3)]
    assert sorted(index for part in parts for index in part) == list(range(11))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    with pytest.raises(ValueError, match="rank 3 of 3"):
        share(range(11), 3, 3)


def test_names_are_shortened_from_the_fourth_on():
    assert named(["a", "b", "c"]) == "3 (a, b, c)"
    assert named(["a", "b", "c", "d"]) == "4 (a, b, c, ...)"


def shards(folder: Path) -> list[Path]:
    return [
        write_shard(
            folder / "first.tar",
            {
                "000.png": picture("red"),
                "000.json": '{"prompt": "red"}',
                "deep/001.JPG": picture("lime", form="JPEG"),
                "deep/001.txt": "green\n",
            },
        ),
        write_shard(folder / "second.tar", {"000.txt": "blue", "000.webp": picture("blue", form="WEBP")}),
    ]


def test_a_shard_that_has_changed_is_unpacked_anew(tmp_path):
    pytest.importorskip("webdataset")
    other: dict[str, str | bytes] = {"1.png": picture(), "1.txt": "b"}
    shard = write_shard(tmp_path / "own.tar", {"0.png": picture("red"), "0.txt": "red", **other})
    assert unpack_shards([shard], tmp_path / "out") == Counts(done=2)
    write_shard(shard, {"0.png": picture("blue"), "0.txt": "blue", **other})
    assert unpack_shards([shard], tmp_path / "out") == Counts(done=1, skipped=1)
    first, second = find_pictures(tmp_path / "out")
    assert (first.path.read_bytes(), first.caption, second.caption) == (picture("blue"), "blue", "b")


def test_shards_are_read_in_order(tmp_path):
    found = list(read_shards(shards(tmp_path)))
    assert [(one.name, one.ending, one.caption) for one in found] == [
        ("first/000", ".png", "red"),
        ("first/deep/001", ".jpg", "green"),
        ("second/000", ".webp", "blue"),
    ]
    brightest = [int(load_picture(io.BytesIO(one.data), (4, 4)).mean(dim=(1, 2)).argmax()) for one in found]
    assert brightest == [0, 1, 2]


def test_shards_become_a_folder_once(tmp_path):
    folder = tmp_path / "pictures"
    assert unpack_shards(shards(tmp_path), folder).done == 3
    assert [(one.name, one.caption) for one in find_pictures(folder)] == [
        ("first/000", "red"),
        ("first/deep/001", "green"),
        ("second/000", "blue"),
    ]
    (folder / "second/000.webp").unlink()
    counts = unpack_shards(shards(tmp_path), folder)
    assert (counts.done, counts.skipped) == (1, 2)
    assert (folder / "second/000.webp").exists()


def test_a_corrupt_picture_in_a_shard_is_named_and_left_out(tmp_path, caplog):
    files: dict[str, str | bytes] = {"a.png": b"none", "a.txt": "one", "b.png": picture(), "b.txt": "two"}
    assert [one.name for one in read_shards([write_shard(tmp_path / "s.tar", files)])] == ["s/b"]
    assert "corrupt image: s/a" in caplog.text and "1 of the 2" in caplog.text
    with pytest.raises(ValueError, match="1 corrupt"):
        list(read_shards([write_shard(tmp_path / "s.tar", {"a.png": b"none", "a.txt": "one"})]))


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"a.png": picture()}, "s/a, got png only"),
        ({"a.png": picture(), "b.png": picture(), "a.txt": "one", "b.txt": "two"}, "next to each other"),
        ({"a.txt": "one"}, "s/a, got txt only"),
        ({"a.png": picture(), "a.json": "{"}, "s/a is not JSON"),
        ({"../a.png": picture(), "../a.txt": "one"}, "names below"),
        ({"/a.png": picture(), "/a.txt": "one"}, "names below"),
    ],
)
def test_what_a_shard_lacks_is_said(files, said, tmp_path):
    with pytest.raises(ValueError, match=said):
        list(read_shards([write_shard(tmp_path / "s.tar", files)]))


def test_shards_that_cannot_be_read_are_named(tmp_path):
    first, _ = shards(tmp_path)
    first.write_bytes(first.read_bytes()[:600])
    with pytest.raises(ValueError, match="first.tar is not whole"):
        list(read_shards([first]))
    with pytest.raises(ValueError, match="third.tar is not whole"):
        list(read_shards([tmp_path / "third.tar"]))
    for wrong in ([], [first, tmp_path / "other/first.tar"]):
        with pytest.raises(ValueError, match="each of another name"):
            list(read_shards(wrong))


def test_without_webdataset_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "webdataset.tariterators", None)
    with pytest.raises(ImportError, match=r"diffattn\[train\]"):
        list(read_shards(shards(tmp_path)))


def test_ranges_of_shards(tmp_path):
    for name in ("a-08", "a-09", "a-10", "b"):
        (tmp_path / f"{name}.tar").touch()
    found = find_shards([f"{tmp_path}/a-{{08..10}}.tar", f"{tmp_path}/b.tar"])
    assert [path.stem for path in found] == ["a-08", "a-09", "a-10", "b"]
    with pytest.raises(ValueError, match=r"each a file, got none for 2 \(.*a-07.tar, .*a-11.tar\)"):
        find_shards([f"{tmp_path}/a-{{07..11}}.tar"])
    with pytest.raises(ValueError, match="got none for 0"):
        find_shards([])


def test_each_process_finds_the_whole_folder_behind_it(tmp_path):
    paths = shards(tmp_path)
    counts = unpack_shards(paths, tmp_path / "pictures", rank=1, world=2)
    assert counts.done == 3
    first = min((tmp_path / "pictures").rglob("*.json"), key=lambda path: path.stat().st_mtime_ns)
    assert first.parent.name == "second"
    assert unpack_shards(paths, tmp_path / "pictures", rank=0, world=2).skipped == 3
    with pytest.raises(ValueError, match="rank 2 of 2"):
        unpack_shards(paths, tmp_path / "pictures", rank=2, world=2)


def test_the_place_among_processes_is_torchruns():
    assert own_place({}) == (0, 1)
    assert own_place({"RANK": "1", "WORLD_SIZE": "3", "LOCAL_RANK": "1"}) == (1, 3)


@pytest.mark.parametrize(
    "said", [{"RANK": "1"}, {"WORLD_SIZE": "2"}, {"RANK": "2", "WORLD_SIZE": "2"}, {"RANK": "one"}]
)
def test_a_wrong_place_is_said(said):
    with pytest.raises(ValueError, match="expected RANK from 0 to WORLD_SIZE - 1"):
        own_place(said)
