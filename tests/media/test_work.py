"""The folder of a run's work: only what a run made is ever removed."""

import json
from pathlib import Path

import pytest

from diffattn.files.writing import PART, remove_temporary, written
from diffattn.media.work import WorkFolder


class Folder(WorkFolder):
    own = (r"parts/\w+\.mp4", r"state\.json")


def test_a_folder_of_the_users_keeps_files_of_the_runs_names(tmp_path: Path) -> None:
    project = tmp_path / "proj"
    (project / "parts").mkdir(parents=True)
    texts = {"settings.json": '{"editor":"mine"}', "output.json": "[1,2,3]", "state.json": "{}", "parts/a.mp4": "x"}
    for name, text in texts.items():
        (project / name).write_text(text)
    folder = Folder(tmp_path / "v.mp4", project)
    for resume in (False, True):
        with pytest.raises(ValueError, match="not of a run"):
            folder.open({}, resume)
    folder.clear()
    folder.remove()
    assert {name: (project / name).read_text() for name in texts} == texts
    for name in texts:
        if name != "settings.json":
            (project / "settings.json").unlink(missing_ok=True)
            with pytest.raises(ValueError, match="not of a run"):
                Folder(tmp_path / "v.mp4", project).open({}, resume=False)
            assert (project / name).read_text() == texts[name]


def test_what_a_run_made_goes_and_the_folder_of_the_user_stays(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for path, stays in ((tmp_path / "empty", True), (tmp_path / "new" / "work", False)):
        folder = Folder(tmp_path / "v.mp4", path)
        folder.open({"seed": 3}, resume=False)
        (path / "state.json").write_text("{}")
        with pytest.raises(ValueError, match="did not end"):
            Folder(tmp_path / "v.mp4", path).open({"seed": 3}, resume=False)
        Folder(tmp_path / "v.mp4", path).open({"seed": 3}, resume=True)
        folder.remove()
        assert path.exists() == stays and not (stays and list(path.iterdir()))
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


@pytest.mark.parametrize(
    ("output", "work"),
    [("x.mp4", "x.mp4"), ("w/parts/x.mp4", "w"), ("x", "x/w"), ("x.mp4", "file/x"), ("x.mp4", "link")],
)
def test_places_in_the_way_of_each_other_are_refused(tmp_path: Path, output: str, work: str) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="expected a folder"):
        Folder(tmp_path / output, tmp_path / work).open({}, resume=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "link"]


@pytest.mark.parametrize("output", [".", "/"])
def test_an_output_without_a_name_is_refused(output: str) -> None:
    with pytest.raises(ValueError, match="expected the name of a file or folder for --output"):
        WorkFolder(Path(output))


def test_half_written_files_are_told_from_hidden_ones_of_the_user(tmp_path: Path) -> None:
    with written(tmp_path / "v.mp4") as file:
        left = file.name
    assert PART in left
    (tmp_path / left).touch()
    (tmp_path / ".v-original.mp4").write_text("mine")
    remove_temporary(tmp_path / "v.mp4")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".v-original.mp4", "v.mp4"]


def test_the_settings_of_a_run_bear_its_mark(tmp_path: Path) -> None:
    folder = Folder(tmp_path / "v.mp4")
    folder.open({"seed": 3}, resume=False)
    assert json.loads((folder.path / "settings.json").read_text())["diffattn"] == "work of a run"
