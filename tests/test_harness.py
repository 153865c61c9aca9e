"""The test harness itself: a golden set that cannot be read must not look like one that passed."""

import hashlib
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_record import Record
from golden_vectors import LATER, OWN_SET, GoldenCase, assert_golden, golden_cases
from safetensors.torch import load_file, save_file
from tolerances import assert_close


def write_case(folder: Path, name: str, **spec: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(json.dumps(spec))
    return path


def test_every_own_case_names_its_source_and_tolerance_and_has_its_tensors() -> None:
    systems = sorted(folder.name for folder in OWN_SET.iterdir() if folder.is_dir())
    assert {"agent", "clear"} <= set(systems)
    for system in systems:
        if "files" in index_of(OWN_SET / system):
            continue
        for parameter in golden_cases(system):
            (case,) = parameter.values
            assert parameter.id == f"{system}/{case.path.name}"
            assert case.spec.get("source") or case.spec["source_repo"]
            assert case.spec.get("source_commit") or case.spec.get("commit") or case.name.startswith("clean_")
            if not case.spec.get("tensors"):
                exact = ("keys", "cases", "state_dict", "chunks")
                assert any(case.spec.get(name) for name in exact), "neither tensors nor anything else to compare"
                continue
            assert {"atol", "u8_atol"} & case.tolerance.keys() and all(
                case.tolerance.get(name, 1) > 0 for name in ("atol", "u8_atol")
            )
            described = {name: shape_of(entry) for name, entry in case.spec["tensors"].plain().items()}
            shapes = {name: list(tensor.shape) for name, tensor in case.tensors().items()}
            undescribed = shapes.keys() - described.keys()
            assert all(name.startswith(("weights.", "w/")) for name in undescribed)  # as in video_infinity and star
            assert described == {name: shape for name, shape in shapes.items() if name not in undescribed}


def index_of(folder: Path) -> dict[str, Any]:
    """Sets of files with many cases each are described by their index, and not by a JSON file for each case."""
    path = folder / "index.json"
    read = json.loads(path.read_text()) if path.is_file() else {}
    return read if isinstance(read, dict) else {}


@pytest.mark.parametrize("folder", [folder for folder in sorted(OWN_SET.iterdir()) if "files" in index_of(folder)])
def test_an_index_describes_its_files(folder: Path) -> None:
    """Each one's source, tolerance, and every tensor or how many there are."""
    index = index_of(folder)
    assert index["source"] and index["commit"]
    assert index["files"].keys() == {path.name for path in folder.iterdir()} - {"index.json"}
    for name, entry in index["files"].items():
        if entry["kind"] == "json":
            assert json.loads((folder / name).read_text())
            continue
        shapes = {key: list(tensor.shape) for key, tensor in load_file(folder / name).items()}
        described = entry["tensors"]
        if isinstance(described, dict):
            assert {key: shape_of(value) for key, value in described.items()} == shapes, name
        else:
            assert described == f"{len(shapes)} tensors", name
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == entry["sha256"], name
        if entry["kind"] == "weights" or name.endswith("_inputs.safetensors"):
            continue  # nothing to compare with
        allowed = entry["tolerance"].get("rel_l2", entry["tolerance"].get("atol"))
        assert all(value > 0 for value in (allowed.values() if isinstance(allowed, dict) else [allowed])), name


def shape_of(entry: Any) -> list[int]:
    """Sets describe a tensor by its shape, by shape and dtype, or by name."""
    if isinstance(entry, dict):
        return list(entry["shape"])
    return list(entry[0]) if entry and isinstance(entry[0], list) else list(entry)


def test_a_further_set_replaces_the_own_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_case(tmp_path / "clear", "local_new", config={"kind": "local"})
    write_case(tmp_path / "clear", "index", cases=[])
    write_case(tmp_path / "clear", "tiny_config", layers=1)
    monkeypatch.setenv("DIFFATTN_GOLDEN", str(tmp_path))
    assert [parameter.id for parameter in golden_cases("clear")] == ["clear/local_new.json"]


def test_a_system_that_a_further_set_lacks_is_skipped_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_case(tmp_path / "clear", "local_new")
    monkeypatch.setenv("DIFFATTN_GOLDEN", str(tmp_path))
    (parameter,) = golden_cases("agent")
    (mark,) = parameter.marks
    assert mark.name == "skip"
    assert "no cases of agent" in mark.kwargs["reason"]


def test_no_cases_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError, match="'no such system'"):
        golden_cases("no such system")
    monkeypatch.setenv("DIFFATTN_GOLDEN", str(tmp_path / "absent"))
    with pytest.raises(NotADirectoryError, match="DIFFATTN_GOLDEN"):
        golden_cases("clear")
    monkeypatch.setenv("DIFFATTN_GOLDEN", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="should have a folder 'clear'"):
        golden_cases("clear")
    write_case(tmp_path / "clear", "index")
    with pytest.raises(FileNotFoundError, match="holds no case"):
        golden_cases("clear")


def test_cases_of_work_to_come_are_skipped_with_their_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LATER, ("video_infinity", "group_norm"), "not built yet")
    marks = {parameter.values[0].kind: parameter.marks for parameter in golden_cases("video_infinity")}
    assert marks["temporal_attention"] == []
    assert [mark.kwargs["reason"] for mark in marks["group_norm"]] == ["not built yet"]


def test_tensors_may_lie_in_parts(tmp_path: Path) -> None:
    case = GoldenCase(write_case(tmp_path / "star", "unet"))
    with pytest.raises(FileNotFoundError, match="no tensors"):
        case.tensors()
    case = GoldenCase(case.path)
    save_file({"a": torch.ones(2)}, tmp_path / "star" / "unet-0.safetensors")
    save_file({"b": torch.ones(3)}, tmp_path / "star" / "unet-1.safetensors")
    save_file({"c": torch.ones(4)}, tmp_path / "star" / "unet_other.safetensors")
    assert sorted(case.tensors()) == ["a", "b"]


def test_assert_golden_names_what_differs() -> None:
    want = torch.zeros(3)
    tolerance = {"atol": 1e-3, "rtol": 0.0, "note": "float32"}
    assert_golden("out", want + 5e-4, want, tolerance)
    for wrong in (want + 2e-3, want.double(), torch.zeros(4)):
        with pytest.raises(AssertionError, match="^out: "):
            assert_golden("out", wrong, want, tolerance)


def test_assert_golden_allows_bytes_their_steps() -> None:
    want = torch.tensor([0, 255], dtype=torch.uint8)
    assert_golden("picture", torch.tensor([1, 254], dtype=torch.uint8), want, {"u8_atol": 1})
    with pytest.raises(AssertionError):
        assert_golden("picture", torch.tensor([2, 255], dtype=torch.uint8), want, {"u8_atol": 1})


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_assert_close_goes_by_the_dtype_of_the_result(dtype: torch.dtype) -> None:
    want = torch.zeros(2, dtype=torch.float64)
    inside, outside = {torch.float64: (1e-11, 1e-9), torch.float32: (1e-5, 3e-5), torch.bfloat16: (1e-2, 3e-2)}[dtype]
    assert_close(torch.full((2,), inside, dtype=dtype), want)
    with pytest.raises(AssertionError, match="^out"):
        assert_close(torch.full((2,), outside, dtype=dtype), want, "out")


def test_poisoned_memory_shows(poisoned_memory: None) -> None:
    assert torch.empty(8).isnan().all()
    assert torch.zeros(8).new_empty(8).isnan().all()
    assert torch.empty_like(torch.zeros(8, dtype=torch.bfloat16)).isnan().all()


def test_a_record_notes_what_was_asked_for() -> None:
    record = Record({"a": 1, "b": {"c": 2, "d": [{"e": 3, "f": 4}, {"e": 5}]}, "g": [1, 2], "seed": 7, "note": "words"})
    assert record.left() == ["a", "b", "g", "seed"]
    assert "a" in record and len(record) == 5 and record.get("absent") is None
    assert record.left() == ["a", "b", "g", "seed"]
    assert record["a"] == 1 and record["g"] == [1, 2]
    assert record.left() == ["b", "seed"]
    inner = record["b"]
    assert record.left() == ["b.c", "b.d", "seed"]
    assert [part["e"] for part in inner["d"]] == [3, 5]
    record.told("seed", "absent")
    assert record.left() == ["b.c", "b.d.0.f"]
    assert inner.plain() == {"c": 2, "d": [{"e": 3, "f": 4}, {"e": 5}]}
    assert record.left() == []


def test_tensors_under_a_prefix_are_asked_for() -> None:
    record = Record({"w.a": torch.ones(1), "w.b": torch.ones(2), "x": torch.ones(3)}, path=("tensor",))
    assert sorted(record.under("w.")) == ["a", "b"]
    assert record.left() == ["tensor.x"]


def test_a_case_with_more_than_its_test_uses_fails(tmp_path: Path) -> None:
    path = write_case(
        tmp_path / "star", "new", source="there", tolerance={"atol": 1}, config={"a": 1, "b": 2}, steps=4, tensors={}
    )
    save_file({"x": torch.ones(1), "y": torch.ones(1)}, path.with_suffix(".safetensors"))
    case = GoldenCase(path)
    assert case.config["a"] == 1 and case.tensors()["y"] == 1
    with pytest.raises(AssertionError, match=r"new.json .*\['config.b', 'steps', 'tensor.x'\]"):
        case.check_used()
    assert pickle.loads(pickle.dumps(case)).asked == set()
    assert [case.config["b"], case.spec["steps"], float(case.tensors()["x"])] == [2, 4, 1]
    case.check_used()
