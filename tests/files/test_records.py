"""Records beside what commands make."""

import json
from pathlib import Path

import pytest

from diffattn.files.records import Record, check_record, find_record, path_beside, recorded


def leave(path: Path) -> Path:
    with recorded(path, "generate", {"model": "tiny", "shares": (0.5, 0.2), "none": None}) as made:
        made |= {"files": [path.parent / "a.png"], "height": 8}
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
    full = leave(tmp_path / "b.png.json")
    assert find_record(tmp_path / "b.png") == full and find_record(full) == full
    assert find_record(tmp_path / "c.JSON") == tmp_path / "c.JSON"
