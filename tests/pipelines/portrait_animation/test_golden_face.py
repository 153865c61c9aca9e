"""Alignment and patches of X-Portrait's faces against recorded numbers."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffattn.pipelines.portrait_animation.face.alignment import Alignment, align_faces, best_frame, resize
from diffattn.pipelines.portrait_animation.face.detection import scale_points
from diffattn.pipelines.portrait_animation.face.patches import local_control, patch_boxes
from golden_portrait import FACES, SYSTEM, PortraitCase, read_json
from golden_vectors import golden_root, run_golden
from safetensors.torch import save_file

Arrays = dict[str, np.ndarray]


def face_cases() -> list[Any]:
    """Parameters `xportrait/<file>::<case>` of all cases of faces."""
    folder = golden_root() / SYSTEM
    if not (folder / "index.json").is_file():
        reason = f"the golden set in {golden_root()} has no cases of {SYSTEM}"
        return [pytest.param(None, id=f"{SYSTEM}/absent", marks=pytest.mark.skip(reason=reason))]
    found = [
        pytest.param(PortraitCase(folder / file, name, entry), id=f"{SYSTEM}/{file}::{name}")
        for file, entry in read_json(folder / "index.json")["files"].items()
        if entry["kind"] == FACES
        for name in entry["cases"]
    ]
    assert found, f"no golden cases: {folder}/index.json lists none of faces"
    return found


def close(case: PortraitCase, name: str, got: np.ndarray, want: np.ndarray) -> None:
    case.close(name, torch.from_numpy(np.ascontiguousarray(got)), torch.from_numpy(want))


def patches(case: PortraitCase, tensors: Arrays) -> None:
    config, size = case.config(), case.config()["target_res"]
    config.told("note")
    repeat = size // len(tensors["image64_uint8"])
    picture = (tensors["image64_uint8"].repeat(repeat, 0).repeat(repeat, 1) / 255).astype(np.float32)
    points = scale_points(tensors["landmarks256"].astype(np.float64), (256, 256), (size, size))
    control = 2 * local_control(picture, points) - 1
    close(case, "out", control.transpose(2, 0, 1)[:, 3::8, 3::8], tensors["out_sub8"])
    assert np.array_equal((control != -1).any(-1)[::4, ::4], tensors["mask"] == 1)
    assert (control != -1).any(-1).sum() == config["mask_pixels"]
    assert control.sum(dtype=np.float64) == pytest.approx(config["sum_out"], abs=0.1)
    rest, half = 2 * picture - 1, config["half_size"]
    for (rows, columns), (x, y) in zip(patch_boxes(points, size, size), config["centers_xy_512"], strict=True):
        assert (rows, columns) == (slice(y - half, y + half), slice(x - half, x + half))
        rest[rows, columns] = -1
    close(case, "removed", rest.transpose(2, 0, 1)[:, 3::8, 3::8], tensors["removed_sub8"])


def alignment(case: PortraitCase, tensors: Arrays) -> None:
    """Of all frames by one of them; by none, as where a face is missing, they are resized alone."""
    config, size = case.config(), 512
    config.told("sub", "note")
    number = chosen_frame(config["best_frame_arg"], tensors)
    assert number == config["best_frame_used"]
    frames = [resize(frame, size, size) for frame in tensors["driving_uint8"]]
    for name in [name for name in tensors if name.startswith("affine")]:
        side = int(name.removeprefix("affine").removesuffix("_drv_to_src"))
        found = alignment_of(tensors, number, side)
        matrix = np.eye(2, 3) if found is None else np.column_stack([np.diag(found.scale), found.shift])
        close(case, name, matrix, tensors[name])
    found = alignment_of(tensors, number, size)
    frames = [frame if found is None else found.warp(frame) for frame in frames]
    aligned = np.stack([frame[5::16, 5::16] for frame in frames])
    error = np.abs(aligned - tensors["aligned512_sub16"]).max()
    assert aligned.dtype == np.float32 and error <= config["tolerance_pixels"]


def faces_of(tensors: Arrays, name: str) -> list[np.ndarray | None]:
    """Points of each face; None for one that was not found."""
    given = tensors.get(f"{name}_landmarks256")
    if given is None or given.size == 0:
        return []
    faces = given.astype(np.float64).reshape(-1, 68, 2)
    return [None if np.isnan(face).any() else face for face in faces]


def chosen_frame(asked: int | None, tensors: Arrays) -> int | None:
    """-1 searches, -2 aligns nothing; so it is without a face in the source or in the frame that was asked for."""
    source, driving = (faces_of(tensors, name) for name in ("source", "driving"))
    if asked is None or asked < -1 or not source or source[0] is None or not any(face is not None for face in driving):
        return None
    number = best_frame(source[0], driving) if asked == -1 else asked
    return None if driving[number] is None else number


def alignment_of(tensors: Arrays, number: int | None, side: int) -> Alignment | None:
    if number is None:
        return None
    source, driving = faces_of(tensors, "source")[0], faces_of(tensors, "driving")[number]
    return align_faces(*(scale_points(face, (256, 256), (side, side)) for face in (source, driving)))


RUNNERS: dict[str, Callable[[PortraitCase, Arrays], None]] = {"centers_xy_512": patches, "best_frame_arg": alignment}
"""By what only such a case is configured by."""


@pytest.mark.golden
@pytest.mark.parametrize("case", face_cases())
def test_golden(case: PortraitCase) -> None:
    runners = [run for key, run in RUNNERS.items() if key in case.config()]
    assert len(runners) == 1, f"no runner for a case of {sorted(case.config())}; there are those with {list(RUNNERS)}"
    runners[0](case, {name: tensor.numpy() for name, tensor in case.tensors().items()})


@pytest.mark.parametrize(
    ("asked", "missing"), [(None, None), (-2, None), (-1, "driving"), (1, "driving"), (0, "source")]
)
def test_without_a_best_frame_frames_are_resized_alone(tmp_path: Path, asked: int | None, missing: str | None) -> None:
    driving = torch.randint(0, 256, (2, 40, 30, 3), dtype=torch.uint8)
    tensors = {"driving_uint8": driving, "aligned512_sub16": torch.from_numpy(
        np.stack([resize(frame, 512, 512)[5::16, 5::16] for frame in driving.numpy()]))}  # fmt: skip
    for name, faces in (("source", ()), ("driving", (2,))):
        points = torch.rand(*faces, 68, 2, dtype=torch.float64) * 256
        tensors[f"{name}_landmarks256"] = points.fill_(torch.nan) if name == missing else points
    config = {"best_frame_arg": asked, "best_frame_used": None, "sub": "words", "tolerance_pixels": 1e-6}
    entry = {"kind": FACES, "tolerance": {"atol": 1e-6}, "cases": {"none": config}}
    save_file({f"none.{name}": tensor for name, tensor in tensors.items()}, tmp_path / "faces.safetensors")
    run_golden(test_golden, PortraitCase(tmp_path / "faces.safetensors", "none", entry))
