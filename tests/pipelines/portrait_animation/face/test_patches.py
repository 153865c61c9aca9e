"""Patches of eyes and mouth."""

import numpy as np
import pytest
from diffattn.pipelines.portrait_animation.face.patches import local_control, patch_boxes


def face(right: tuple[float, float], left: tuple[float, float], mouth: tuple[float, float], size: float) -> np.ndarray:
    """Points at the middles of eyes and mouth, with the others spread over a box of `size`, in it."""
    points = np.full((68, 2), (right[0] + left[0]) / 2)
    points[:17] = np.linspace((left[0], left[1]), (left[0] + size, left[1] + size), 17)
    points[36:42], points[42:48], points[48:68] = left, right, mouth
    return points


CENTRE = face((160.0, 100.0), (100.0, 104.0), (130.0, 170.0), 120.0)


def box(x: int, y: int, reach: int) -> tuple[slice, slice]:
    return slice(y - reach, y + reach), slice(x - reach, x + reach)


def test_patches_lie_around_eyes_and_mouth() -> None:
    assert patch_boxes(CENTRE, 256, 256) == [box(160, 100, 32), box(100, 104, 32), box(130, 170, 32)]
    assert patch_boxes(CENTRE * 3, 768, 768) == [box(480, 300, 96), box(300, 312, 96), box(390, 510, 96)]


def test_the_first_point_of_each_group_does_not_count() -> None:
    other = CENTRE.copy()
    other[[36, 42, 48]] += 50
    assert patch_boxes(other, 256, 256) == patch_boxes(CENTRE, 256, 256)
    other[37] += 50
    assert patch_boxes(other, 256, 256)[1] == box(110, 114, 32)


@pytest.mark.parametrize(("height", "width"), [(256, 256), (256, 400), (384, 256)])
def test_patches_stay_in_the_frame(height: int, width: int) -> None:
    corners = face((-90.0, -5.0), (width + 40.0, 3.0), (width - 1.0, height + 9.0), 500.0)
    for rows, columns in patch_boxes(corners, height, width):
        assert rows.stop - rows.start == columns.stop - columns.start == 64
        assert rows.start >= 0 and columns.start >= 0 and rows.stop < height and columns.stop < width
    (top, left), _, (bottom, right) = patch_boxes(corners, height, width)
    assert (top.start, left.start, bottom.stop, right.stop) == (0, 0, height - 1, width - 1)


def test_scaled_patches_follow_the_size_of_the_face() -> None:
    for size, reach in ((128.0, 32), (64.0, 16), (200.0, 50)):
        points = face((130.0, 130.0), (110.0, 110.0), (120.0, 128.0), size)
        assert patch_boxes(points, 256, 256, scaled=True)[0] == box(130, 130, reach)
        assert patch_boxes(points, 256, 256)[0] == box(130, 130, 32)
    for size in (0.1, 4000.0):
        for rows, columns in patch_boxes(face((1.0, 1.0), (0.0, 0.0), (1.0, 1.0), size), 64, 80, scaled=True):
            assert 0 <= rows.start < rows.stop <= 64 and 0 <= columns.start < columns.stop <= 80


@pytest.mark.parametrize(("height", "width"), [(512, 512), (97, 131), (1, 1)])
def test_the_picture_holds_patches_on_black(height: int, width: int) -> None:
    picture = np.random.default_rng(0).random((height, width, 3), dtype=np.float32) / 2 + 0.5
    points = CENTRE * (width / 256, height / 256)
    control = local_control(picture, points)
    inside = np.zeros((height, width), dtype=bool)
    for area in patch_boxes(points, height, width):
        inside[area] = True
    assert control.shape == picture.shape and control.dtype == np.float32 and inside.any()
    assert np.array_equal(control[inside], picture[inside]) and not control[~inside].any()


def test_without_a_face_all_is_black_and_the_picture_stays() -> None:
    picture = np.ones((20, 30, 3), dtype=np.float32)
    assert not local_control(picture, None).any()
    local_control(picture, CENTRE / 10)
    assert (picture == 1).all()


def test_what_is_no_picture_or_face_is_refused() -> None:
    picture = np.ones((20, 30, 3), dtype=np.float32)
    for wrong in (picture[..., 0], (picture * 255).astype(np.uint8), picture[:0]):
        with pytest.raises(ValueError, match="expected a float image"):
            local_control(wrong, CENTRE)
    for points in (CENTRE[:5], CENTRE[None], CENTRE * np.inf):
        with pytest.raises(ValueError, match="expected finite points of one face"):
            local_control(picture, points)
