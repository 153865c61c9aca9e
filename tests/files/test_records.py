"""Records beside what commands make."""

import json
from pathlib import Path

import pytest

from diffattn.files.records import Record, check_record, find_record, path_beside, recorded


def leave(path: Path, *names: str) -> Path:
    with recorded(path, "generate", {"model": "tiny", "shares": (0.5, 0.2), "none": None}) as made:
        made |= {"files": [path.parent / name for name in names or ("a.png",)], "height": 8}
    return path


def test_a_record_holds_options_and_names_of_files_without_folders(tmp_path: Path) -> None:
    record = Record.read(leave(tmp_path / "a.json"))
    assert record.options == {"model": "tiny", "shares": [0.5, 0.2], "none": None}
    assert record.made == {"files": ["a.png"], "height": 8} and not record.differences()
    assert str(tmp_path) not in (tmp_path / "a.json").read_text()


def test_nothing_is_left_where_the_block_fails(tmp_path: Path) -> None:
    leave(tmp_path / "a.json")
    before = (tmp_path / "a.json").read_text()
    with pytest.raises(OSError), recorded(tmp_path / "a.json", "generate", {"model": "other"}):
        raise OSError
    assert (tmp_path / "a.json").read_text() == before and len(list(tmp_path.iterdir())) == 1


def test_another_file_is_replaced_when_asked_alone(tmp_path: Path) -> None:
    check_record(tmp_path / "a.json")
    check_record(leave(tmp_path / "a.json"))
    for text in (
        '{"prompt": "mine"}',
        "{",
        "[]",
        json.dumps({"command": 1, "options": {}, "made": {}, "versions": {}}),
    ):
        (tmp_path / "a.json").write_text(text)
        with pytest.raises(
            ValueError, match="a.json is there and is no record .* add --overwrite, or give another name"
        ):
            check_record(tmp_path / "a.json")
        check_record(tmp_path / "a.json", overwrite=True)
    (tmp_path / "b.json").mkdir()
    with pytest.raises(ValueError, match="b.json is there"):
        check_record(tmp_path / "b.json", overwrite=True)


def test_a_record_is_found_by_what_it_is_beside(tmp_path: Path) -> None:
    assert path_beside(Path("x/a.png")) == Path("x/a.json") and path_beside(Path("x/frames")) == Path("x/frames.json")
    assert path_beside(Path("a.png"), full=True) == Path("a.png.json")
    full = leave(tmp_path / "b.png.json", "b.png")
    assert find_record(tmp_path / "b.png") == full and find_record(full) == full
    assert find_record(tmp_path / "c.JSON") == tmp_path / "c.JSON"


def test_numbered_images_and_frames_are_named_by_their_record(tmp_path: Path) -> None:
    several = leave(tmp_path / "m.json", "m-0.png", "m-1.png")
    frames = leave(tmp_path / "f.json", "f")
    assert find_record(tmp_path / "m-1.png") == several
    assert find_record(tmp_path / "f" / "frame-0003.png") == frames == find_record(tmp_path / "f")
    with pytest.raises(ValueError, match="expected a record beside .*m-2.png, m-2.json; there is none"):
        find_record(tmp_path / "m-2.png")


@pytest.mark.parametrize("files", [[3, None], "a.png", {"a.png": 1}])
def test_a_record_that_was_changed_by_hand_does_not_stop_a_run_at_its_end(tmp_path: Path, files: object) -> None:
    place = leave(tmp_path / "a.json")
    values = json.loads(place.read_text())
    place.write_text(json.dumps({**values, "made": {"files": files}}))
    leave(place)
    assert Record.read(place).made["files"] == ["a.png"]


def test_a_run_again_with_fewer_images_has_the_same_record(tmp_path: Path) -> None:
    for name in ("m-0.png", "m-1.png"):
        (tmp_path / name).write_bytes(b"")
    leave(tmp_path / "m.json", "m-0.png", "m-1.png")
    leave(tmp_path / "m.json", "m-0.png")
    assert [path.name for path in tmp_path.glob("*.json")] == ["m.json"]
    assert Record.read(tmp_path / "m.json").made["files"] == ["m-0.png"]


def test_a_record_of_another_ending_is_kept_and_never_taken(tmp_path: Path) -> None:
    for name in ("a.png", "a.jpg", "a.mp4"):
        (tmp_path / name).write_bytes(b"")
        leave(tmp_path / "a.json", name)
    found = {name: find_record(tmp_path / name).name for name in ("a.png", "a.jpg", "a.mp4")}
    assert found == {"a.png": "a.json", "a.jpg": "a.jpg.json", "a.mp4": "a.mp4.json"}
    leave(tmp_path / "a.json", "a.jpg")  # again: its own is replaced
    assert len(list(tmp_path.glob("*.json"))) == 3
    (tmp_path / "a").mkdir()
    leave(tmp_path / "a.json", "a")
    assert find_record(tmp_path / "a").name == "a-2.json"
    (tmp_path / "a.png").unlink()
    leave(tmp_path / "a.json", "a.webp")  # what it named is gone
    with pytest.raises(ValueError, match="a.json is that of a.webp: name the JSON file itself"):
        find_record(tmp_path / "a.png")
