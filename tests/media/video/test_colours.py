"""Levels of frames as they are shown: exact, of any range, matrix and depth, right way up; HDR and wide gamut."""

import logging
import struct
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("av", reason="needs PyAV, the extra `video`")

import av
from video_files import encode, noise, picture

from diffattn.media.video import VideoWriter, gamut, probe, read_frames

LUMA = {1: (0.2126, 0.0722), 5: (0.299, 0.114), 9: (0.2627, 0.0593)}
"""Of red and blue, by the number of the matrix."""
BLOCKS = np.random.default_rng(1).integers(20, 236, (3, 4, 3))


def flat(blocks: np.ndarray = BLOCKS, side: int = 16) -> np.ndarray:
    return np.kron(blocks, np.ones((side, side, 1), int)).astype(np.uint8)


def inner(frame: np.ndarray, side: int = 16) -> np.ndarray:
    """What no neighbouring block touches."""
    rows, columns = np.indices(frame.shape[:2])
    return frame[((rows % side) // 4 % 3 != 0) & ((columns % side) // 4 % 3 != 0)].astype(float)


def yuv_file(path: Path, pix_fmt: str, blocks: np.ndarray, matrix: int, span: int) -> tuple[Path, np.ndarray]:
    """Y, Cb, Cr of 8 bits as they are, without loss, and the RGB that they stand for."""
    planes = flat(blocks)
    height, width = planes.shape[:2]
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=25)
        stream.height, stream.width, stream.pix_fmt = height, width, pix_fmt
        context = stream.codec_context
        context.colorspace, context.color_range = matrix, span
        frame = av.VideoFrame(width, height, pix_fmt)
        shift = 4 if "10" in pix_fmt else 1
        for number, plane in enumerate(frame.planes):
            step = 2 if number and "420" in pix_fmt else 1
            values = (shift * planes[::step, ::step, number].astype(int)).astype(np.uint16 if shift > 1 else np.uint8)
            rows = np.zeros((len(values), plane.line_size // values.itemsize), values.dtype)
            rows[:, : values.shape[1]] = values
            plane.update(rows.tobytes())
        frame.colorspace, frame.color_range = matrix, span
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    y, cb, cr = np.moveaxis(planes.astype(float), -1, 0)
    y, scale = ((y - 16) / 219, 224) if span == 1 else (y / 255, 255)
    red, blue = LUMA[matrix]
    r = y + 2 * (1 - red) * (cr - 128) / scale
    b = y + 2 * (1 - blue) * (cb - 128) / scale
    g = (y - red * r - blue * b) / (1 - red - blue)
    return path, 255 * np.clip(np.stack([r, g, b], -1), 0, 1)


@pytest.mark.parametrize("pix_fmt", ["yuv420p", "yuv444p", "yuv420p10le", "yuv444p10le"])
@pytest.mark.parametrize(("matrix", "span"), [(1, 1), (1, 2), (5, 1), (9, 1)])
def test_levels_are_rounded_exactly(tmp_path: Path, pix_fmt: str, matrix: int, span: int) -> None:
    blocks = np.random.default_rng(matrix).integers((60, 110, 110), (190, 146, 146), (4, 6, 3))
    path, want = yuv_file(tmp_path / "a.mkv", pix_fmt, blocks, matrix, span)
    (frame,) = read_frames(path)
    gap = inner(frame) - inner(want)
    assert np.abs(gap).max() <= 0.52 and np.abs(gap.mean(0)).max() < 0.2


def test_what_is_written_has_the_levels_it_was_given(tmp_path: Path) -> None:
    frame = flat()
    with VideoWriter(tmp_path / "a.mp4", 25) as video:
        for _ in range(3):
            video.write(frame)
    for found in read_frames(tmp_path / "a.mp4"):
        gap = inner(found) - inner(frame)
        assert np.abs(gap).max() <= 3 and np.abs(gap.mean(0)).max() < 0.4


def test_chroma_lies_where_it_lay(tmp_path: Path) -> None:
    """A ramp of colour comes back unmoved, along rows and columns."""
    ramp = np.full((96, 96, 3), 128, np.uint8)
    ramp[..., 0] = 80 + np.arange(96)
    for frame in (ramp, np.ascontiguousarray(ramp.transpose(1, 0, 2))):
        with VideoWriter(tmp_path / "a.mp4", 25) as video:
            video.write(frame)
        (found,) = read_frames(tmp_path / "a.mp4")
        gap = (found[8:-8, 8:-8, 0].astype(float) - frame[8:-8, 8:-8, 0]).mean()
        assert abs(gap) < 0.3


@pytest.mark.parametrize(("height", "width", "matrix"), [(48, 64, 5), (576, 64, 5), (720, 64, 1), (534, 1280, 1)])
def test_a_file_that_names_no_matrix_is_taken_by_its_size(tmp_path: Path, height: int, width: int, matrix: int) -> None:
    """BT.601 (5) for standard definition, BT.709 (1) for high definition, wide images too."""
    frame = np.full((height, width, 3), (200, 40, 60), np.uint8)
    with av.open(str(tmp_path / "b.mkv"), "w") as container:
        stream = container.add_stream("ffv1", rate=25)
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        plain = av.VideoFrame.from_ndarray(frame, format="rgb24").reformat(format="yuv420p", dst_colorspace=matrix)
        plain.colorspace = 2
        container.mux(stream.encode(plain))
        container.mux(stream.encode())
    (found,) = read_frames(tmp_path / "b.mkv")
    assert np.abs(found.astype(int) - frame).max() <= 2


def test_wide_gamut_is_converted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Colours of BT.709 written as BT.2020's come back."""
    want = flat(np.random.default_rng(2).integers(60, 200, (3, 4, 3)))
    linear = (want / 255) ** 2.4 @ np.linalg.inv(gamut.TO_BT709[gamut.BT2020]).T
    wide = np.round(255 * linear.clip(0, 1) ** (1 / 2.4)).astype(np.uint8)
    path = encode(tmp_path / "a.mkv", [wide], kind="ffv1", pix_fmt="yuv444p", tags=(9, 9, 14, 1))
    with caplog.at_level(logging.WARNING, "diffattn"):
        (found,) = read_frames(path)
    assert np.abs(found.astype(int) - wide).max() > 15
    assert np.abs(inner(found) - inner(want)).max() <= 3
    assert caplog.messages == [f"{path}: colours of BT.2020 are converted to BT.709"]


@pytest.mark.parametrize(("curve", "white"), [(gamut.HLG, 0.75), (gamut.PQ, 0.58069)])
@pytest.mark.parametrize("pix_fmt", ["yuv444p", "yuv420p10le"])
def test_high_dynamic_range_is_converted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, curve: int, white: float, pix_fmt: str
) -> None:
    """Greys stay grey and in order, black black, the peak white; what is dark has the light it had."""
    signals = np.array([0, 40, 80, 120, round(255 * white), 220, 255])
    frame = flat(np.repeat(signals[None, :, None], 3, -1))
    path = encode(tmp_path / "a.mkv", [frame], kind="ffv1", pix_fmt=pix_fmt, tags=(9, 9, curve, 1))
    with caplog.at_level(logging.WARNING, "diffattn"):
        (found,) = read_frames(path)
    greys = found[8, 8::16].astype(int)
    assert np.ptp(greys, axis=-1).max() <= 1
    levels = greys[:, 1]
    assert levels[0] == 0 and levels[-1] == 255 and (np.diff(levels) >= 0).all() and levels[3] < levels[4] < 250
    light = (gamut.light_of_hlg if curve == gamut.HLG else gamut.light_of_pq)(np.full((1, 1, 3), 40 / 255))[0, 0, 0]
    assert levels[1] == pytest.approx(255 * (light / 203) ** (1 / 2.4), abs=2)
    assert len(caplog.messages) == 1 and "tone-mapped from 1000 to 203 cd/m2" in caplog.text


def test_curves_have_their_published_values() -> None:
    """BT.2100 and BT.2408: diffuse white of 203 cd/m2 is at 58 % of PQ and 75 % of HLG."""
    grey = np.full((1, 3), 0.75)
    assert gamut.light_of_hlg(grey) == pytest.approx(203, rel=0.005)
    assert gamut.light_of_hlg(np.ones((1, 3))) == pytest.approx(1000, rel=1e-4)
    assert gamut.light_of_pq(np.array([0.0, 0.58069, 0.75183, 1.0])) == pytest.approx([0, 203, 1000, 10000], rel=1e-3)
    light = np.array([0.1, 5.0, 203.0, 4000.0])
    assert gamut.light_of_pq(gamut.pq_of_light(light)) == pytest.approx(light)


def test_the_roll_off_leaves_what_is_dark_and_keeps_hues() -> None:
    light = np.geomspace(0.01, 1000, 50)[:, None] * np.array([1.0, 0.5, 0.25])
    mapped = gamut.roll_off(light)
    assert mapped[:20] == pytest.approx(light[:20]) and mapped[-1, 0] == pytest.approx(203, rel=1e-3)
    assert (np.diff(mapped[:, 0]) > 0).all() and mapped[:, 1] / mapped[:, 0] == pytest.approx(0.5)


@pytest.mark.parametrize("tags", [(9, 10, 1, 1), (1, 1, 8, 1), (9, 9, 10, 1), (14, 9, 16, 1)])
def test_colours_without_a_conversion_are_refused(tmp_path: Path, tags: tuple[int, int, int, int]) -> None:
    """Primaries of XYZ, linear light, logarithms, ICtCp."""
    path = tmp_path / "a.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=25)
        stream.height, stream.width, stream.pix_fmt = 32, 48, "yuv444p"
        context = stream.codec_context
        context.colorspace, context.color_primaries, context.color_trc, context.color_range = tags
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture(1, 32, 48)), format="rgb24")
        container.mux(stream.encode(frame.reformat(format="yuv444p")))
        container.mux(stream.encode())
    with pytest.raises(ValueError, match=r"expected colours of BT.601, .* in .*a.mkv; got matrix .*; convert it"):
        next(read_frames(path))


def test_what_is_transparent_is_put_on_white(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "a.mkv"
    pixels = np.zeros((32, 48, 4), np.uint8)
    pixels[:, 16:32, 3], pixels[:, 32:, 3] = 128, 255
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=25)
        stream.height, stream.width, stream.pix_fmt = 32, 48, "yuva444p"
        container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgba").reformat(format="yuva444p")))
        container.mux(stream.encode())
    with caplog.at_level(logging.WARNING, "diffattn"):
        (found,) = read_frames(path)
    assert [int(found[9, column, 1]) for column in (4, 24, 40)] == pytest.approx([255, 127, 0], abs=1)
    assert caplog.messages == [f"{path}: transparent in places; put on white"]


def with_matrix(path: Path, matrix: tuple[int, int, int, int]) -> Path:
    """Put a display matrix (a, b, c, d: x' = a x + c y, y' = b x + d y, y down) into the track header of an MP4."""
    data = bytearray(path.read_bytes())
    place = data.find(b"tkhd") + 44
    a, b, c, d = (entry << 16 for entry in matrix)
    data[place : place + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("turn", [0, 1])
@pytest.mark.parametrize("down", [1, -1])
@pytest.mark.parametrize("across", [1, -1])
def test_frames_are_turned_and_mirrored_as_the_file_says(tmp_path: Path, turn: int, down: int, across: int) -> None:
    path = encode(tmp_path / "a.mp4", [picture(3)], crf="1")
    matrix = (0, down, across, 0) if turn else (across, 0, 0, down)
    (found,), want = read_frames(with_matrix(path, matrix)), picture(3)
    want = (want.transpose(1, 0, 2) if turn else want)[::down, ::across]
    assert found.shape == want.shape == (probe(path).height, probe(path).width, 3)
    assert np.abs(found.astype(int) - want).mean() < 6


@pytest.mark.parametrize("ending", ["mp4", "mov", "mkv"])
@pytest.mark.parametrize("aspect", [Fraction(64, 45), Fraction(16, 11), Fraction(3, 4)])
def test_pixels_that_are_not_square_stay_so(tmp_path: Path, ending: str, aspect: Fraction) -> None:
    path = encode(tmp_path / f"in.{ending}", noise(2, 36, 48), aspect=aspect)
    assert probe(path).aspect == aspect
    with VideoWriter(tmp_path / f"out.{ending}", 25, aspect=probe(path).aspect) as video:
        video.write(picture(1, 72, 96))
    assert probe(tmp_path / f"out.{ending}").aspect == aspect
    with pytest.raises(ValueError, match="expected a pixel aspect above 0; got 0; 1 is square"):
        VideoWriter(tmp_path / "a.mp4", 25, aspect=0)


def test_a_turned_video_has_turned_pixels(tmp_path: Path) -> None:
    path = encode(tmp_path / "a.mp4", [picture(1)], aspect=Fraction(4, 3))
    assert probe(with_matrix(path, (0, 1, -1, 0))).aspect == Fraction(3, 4)


def test_interlaced_video_is_told_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = encode(tmp_path / "a.mp4", noise(4, 64, 48), **{"x264-params": "tff=1"})
    with caplog.at_level(logging.WARNING, "diffattn"):
        assert len(list(read_frames(path))) == 4
    assert len(caplog.messages) == 1 and caplog.messages[0].startswith(f"{path}: interlaced")


@pytest.mark.parametrize("ending", ["webp", "tif"])
def test_a_picture_file_of_several_pictures_is_refused(tmp_path: Path, ending: str) -> None:
    from PIL import Image

    frames = [Image.fromarray(picture(number)) for number in range(3)]
    frames[0].save(tmp_path / f"a.{ending}", save_all=True, append_images=frames[1:])
    for function in (probe, read_frames):
        with pytest.raises(ValueError, match=rf"expected a video; got 3 images in .*a.{ending}"):
            function(tmp_path / f"a.{ending}")
