"""Alignment and patches of X-Portrait's faces against recorded numbers."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from diffattn.pipelines.portrait_animation.alignment import align_faces, best_frame, resize
from diffattn.pipelines.portrait_animation.face import scale_points
from diffattn.pipelines.portrait_animation.patches import local_control, patch_boxes
from golden_portrait import FACES, SYSTEM, PortraitCase, read_json
from golden_vectors import golden_root

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
    config, size = case.config(), 512
    source, driving = (tensors[f"{name}_landmarks256"].astype(np.float64) for name in ("source", "driving"))
    number = best_frame(source, list(driving)) if config["best_frame_arg"] == -1 else config["best_frame_arg"]
    assert number == config["best_frame_used"]
    for side in (256, size):
        found = align_faces(*(scale_points(face, (256, 256), (side, side)) for face in (source, driving[number])))
        matrix = np.column_stack([np.diag(found.scale), found.shift])
        close(case, f"affine{side}", matrix, tensors[f"affine{side}_drv_to_src"])
    aligned = np.stack([found.warp(resize(frame, size, size))[5::16, 5::16] for frame in tensors["driving_uint8"]])
    error = np.abs(aligned - tensors["aligned512_sub16"]).max()
    assert aligned.dtype == np.float32 and error <= config["tolerance_pixels"]


RUNNERS: dict[str, Callable[[PortraitCase, Arrays], None]] = {"centers_xy_512": patches, "best_frame_arg": alignment}
"""By what only such a case is configured by."""


@pytest.mark.golden
@pytest.mark.parametrize("case", face_cases())
def test_golden(case: PortraitCase) -> None:
    runners = [run for key, run in RUNNERS.items() if key in case.config()]
    assert len(runners) == 1, f"no runner for a case of {sorted(case.config())}; there are those with {list(RUNNERS)}"
    runners[0](case, {name: tensor.numpy() for name, tensor in case.tensors().items()})
