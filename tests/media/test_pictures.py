"""Image files: found, read, written, laid side by side."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms
from releases import needs

from diffattn.media.pictures import find_pictures, read_picture, side_by_side, write_picture

RGB = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
ALPHA = np.random.default_rng(1).integers(0, 256, (5, 7), dtype=np.uint8)
PROFILE = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


@pytest.mark.parametrize("ending", ["png", "PNG"])
def test_what_is_written_without_loss_is_read_back(tmp_path: Path, ending: str) -> None:
    path = write_picture(tmp_path / f"new/a.{ending}", RGB, ALPHA, PROFILE)
    got = read_picture(path)
    assert np.array_equal(got.pixels, RGB) and np.array_equal(got.alpha, ALPHA) and got.icc == PROFILE
    assert [file.name for file in path.parent.iterdir()] == [f"a.{ending}"]


@pytest.mark.parametrize("ending", ["jpg", "jpeg", "webp"])
def test_lossy_formats_keep_the_picture_and_its_profile(tmp_path: Path, ending: str) -> None:
    smooth = np.indices((33, 48)).sum(0)[..., None].repeat(3, -1).astype(np.uint8)
    got = read_picture(write_picture(tmp_path / f"a.{ending}", smooth, icc=PROFILE))
    assert np.abs(got.pixels.astype(int) - smooth).max() <= 4 and got.alpha is None and got.icc == PROFILE


@pytest.mark.parametrize("ending", ["jpg", "webp"])
def test_a_lower_quality_takes_fewer_bytes(tmp_path: Path, ending: str) -> None:
    noise = np.random.default_rng(2).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    sizes = [write_picture(tmp_path / f"{q}.{ending}", noise, quality=q).stat().st_size for q in (20, 95)]
    assert sizes[0] < 0.7 * sizes[1]


def test_a_jpeg_shows_a_clear_picture_on_white(tmp_path: Path) -> None:
    red = np.zeros((16, 16, 3), dtype=np.uint8)
    red[..., 0] = 200
    for opacity, want in ((0, (255, 255, 255)), (255, (200, 0, 0)), (128, (227, 127, 127))):
        path = write_picture(tmp_path / "a.jpg", red, np.full((16, 16), opacity, dtype=np.uint8))
        assert np.abs(read_picture(path).pixels.astype(int) - want).max() <= 3
    opaque = read_picture(write_picture(tmp_path / "a.webp", red, np.full((16, 16), 7, dtype=np.uint8)))
    assert opaque.alpha is not None and opaque.alpha.max() == 7


def test_a_failed_write_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_picture(tmp_path / "a.png", RGB)
    before = path.read_bytes()

    def half(self: Image.Image, name: Path, **options: object) -> None:
        Path(name).write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(Image.Image, "save", half)
    with pytest.raises(OSError, match="no space"):
        write_picture(path, RGB[::-1])
    assert path.read_bytes() == before and [file.name for file in tmp_path.iterdir()] == ["a.png"]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_turned_upright(tmp_path: Path, orientation: int) -> None:
    """A camera stores the image turned and says so; what is read is what was seen."""
    stored = {
        1: RGB, 2: RGB[:, ::-1], 3: RGB[::-1, ::-1], 4: RGB[::-1], 5: RGB.transpose(1, 0, 2),
        6: np.rot90(RGB, 1), 7: np.rot90(RGB, 2).transpose(1, 0, 2), 8: np.rot90(RGB, -1),
    }[orientation]  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.ascontiguousarray(stored)).save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(read_picture(tmp_path / "a.png").pixels, RGB)


def test_sixteen_bit_gray_is_scaled(tmp_path: Path) -> None:
    values = np.array([[0, 128, 129, 257, 32768, 65535, 300 * 200]], dtype=np.uint16)
    for name in ("a.png", "a.tif"):
        Image.fromarray(values).save(tmp_path / name)
        got = read_picture(tmp_path / name)
        assert got.pixels.shape == (1, 7, 3) and got.alpha is None
        assert np.array_equal(got.pixels[0, :, 1], np.rint(values[0] / 257))


needs_ycbcr = needs("pillow", "13.0.0", "a TIFF of YCbCr is read back")


@pytest.mark.parametrize(
    ("mode", "name"),
    [
        ("L", "a.png"),
        ("1", "a.png"),
        ("P", "a.png"),
        ("CMYK", "a.tif"),
        pytest.param("YCbCr", "a.tif", marks=needs_ycbcr),
    ],
)
def test_every_mode_becomes_rgb(mode: str, name: str, tmp_path: Path) -> None:
    image = Image.fromarray(RGB).convert(mode)
    image.save(tmp_path / name)
    got, want = read_picture(tmp_path / name), np.asarray(image.convert("RGB"))
    assert np.abs(got.pixels.astype(int) - want).max() <= 1 and got.alpha is None
    assert got.pixels.dtype == np.uint8 and got.pixels.flags.writeable


def test_alpha_is_split_off_whatever_holds_it(tmp_path: Path) -> None:
    gray = Image.fromarray(RGB[..., 0])
    gray.putalpha(Image.fromarray(ALPHA))
    gray.save(tmp_path / "a.png")
    got = read_picture(tmp_path / "a.png")
    assert np.array_equal(got.alpha, ALPHA) and np.array_equal(got.pixels, RGB[..., :1].repeat(3, -1))
    palette = Image.new("P", (3, 2), 1)
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putpixel((2, 0), 0)
    palette.save(tmp_path / "b.png", transparency=0)
    got = read_picture(tmp_path / "b.png")
    assert got.alpha is not None and got.alpha.tolist() == [[255, 255, 0], [255, 255, 255]]
    assert got.pixels[1, 1].tolist() == [40, 50, 60]


def test_a_profile_of_other_values_than_rgb_is_dropped(tmp_path: Path) -> None:
    Image.fromarray(RGB[..., 0]).save(tmp_path / "a.png", icc_profile=PROFILE[:16] + b"GRAY" + PROFILE[20:])
    assert read_picture(tmp_path / "a.png").icc is None


def encoded(kind: str) -> bytes:
    file = io.BytesIO()
    noise = np.random.default_rng(3).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    Image.fromarray(noise).save(file, format=kind)
    return file.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "TIFF"])
@pytest.mark.filterwarnings("ignore:Truncated File Read")
def test_a_cut_off_file_is_refused_by_name(tmp_path: Path, kind: str) -> None:
    data = encoded(kind)
    for share in (0.01, 0.3, 0.6, 0.9):
        (tmp_path / "a.png").write_bytes(data[: int(share * len(data))])
        with pytest.raises(ValueError, match="expected an? .*image in .*a.png; got"):
            read_picture(tmp_path / "a.png")


def test_what_is_no_picture_is_refused_by_name(tmp_path: Path) -> None:
    file = tmp_path / "a.png"
    for data, got in ((b"", "an empty file"), (b"plain words", "a file of another kind")):
        file.write_bytes(data)
        with pytest.raises(ValueError, match=f"expected an image in .*a.png; got {got}; leave it out"):
            read_picture(file)
    Image.fromarray(np.zeros((2, 2), dtype=np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(ValueError, match="a.tif; got: floating point pixels"):
        read_picture(tmp_path / "a.tif")
    Image.fromarray(np.full((2, 2), 70000, dtype=np.int32)).save(tmp_path / "a.tif")
    with pytest.raises(ValueError, match="beyond 16 bits"):
        read_picture(tmp_path / "a.tif")
    with pytest.raises(FileNotFoundError, match="missing.png"):
        read_picture(tmp_path / "missing.png")


def test_wrong_writes_are_refused_before_a_file_is_there(tmp_path: Path) -> None:
    good = tmp_path / "a.png"
    with pytest.raises(ValueError, match=r"ends in .png.*got 'a.gif'"):
        write_picture(tmp_path / "a.gif", RGB)
    for wrong in (RGB / 255, RGB[..., 0], RGB[..., :2], RGB[:0]):
        with pytest.raises(ValueError, match=r"expected uint8 RGB pixels \(rows, columns, 3\)"):
            write_picture(good, wrong)
    for alpha in (ALPHA.T, ALPHA / 255):
        with pytest.raises(ValueError, match=r"expected uint8 alpha of shape \(5, 7\)"):
            write_picture(good, RGB, alpha)
    for quality in (0, 101):
        with pytest.raises(ValueError, match="quality from 1 to 100"):
            write_picture(good, RGB, quality=quality)
    with pytest.raises(ValueError, match="at most 16383 pixels for WEBP; got 1 x 16384; write a PNG"):
        write_picture(tmp_path / "a.webp", np.zeros((1, 16384, 3), dtype=np.uint8))
    assert not list(tmp_path.iterdir())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("img10.png", "img2.PNG", "Img1.jpg", "notes.txt", ".hidden.png", "a[1].webp", "below/3.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "folder.png").mkdir()
    return tmp_path


def names(inputs: list[str | Path]) -> list[str]:
    return [path.name for path in find_pictures(inputs)]


def test_a_folder_stands_for_the_pictures_right_in_it(folder: Path) -> None:
    assert names([folder]) == ["a[1].webp", "Img1.jpg", "img2.PNG", "img10.png"]


def test_patterns_files_and_folders_go_in_order_and_each_once(folder: Path) -> None:
    inputs: list[str | Path] = [folder / "img10.png", str(folder / "*.png"), folder, folder / "below/../img2.PNG"]
    assert names(inputs) == ["img10.png", "a[1].webp", "Img1.jpg", "img2.PNG"]
    assert names([f"{folder}/**/*.png"]) == ["3.png", "img10.png"]
    assert names([folder / "a[1].webp", folder / "notes.txt"]) == ["a[1].webp", "notes.txt"]


@pytest.mark.parametrize("name", ["*.jpeg", "missing.png", "folder.png", "*.txt"])
def test_a_name_without_pictures_is_refused(folder: Path, name: str) -> None:
    with pytest.raises(ValueError, match="expected an image, a folder .* leads to no file"):
        find_pictures([folder / "img10.png", folder / name])


def test_a_sheet_holds_the_pictures_at_one_height_below_their_labels() -> None:
    red = np.zeros((20, 60, 3), dtype=np.uint8)
    red[..., 0] = 255
    blue = np.zeros((40, 1, 3), dtype=np.uint8)
    blue[..., 2] = 255
    sheet = side_by_side([red, blue], ["in", "a label far wider than its image"])
    is_red, is_blue = ((sheet == colour).all(-1) for colour in ((255, 0, 0), (0, 0, 255)))
    assert is_red.sum() == 40 * 120 and is_blue.sum() == 40
    assert np.nonzero(is_red)[1].max() < np.nonzero(is_blue)[1].min()
    dark = (sheet < 100).all(-1)
    assert dark.any() and np.nonzero(dark)[0].max() < np.nonzero(is_red)[0].min()
    assert not dark[:, -4:].any(), "the label is cut off"
    assert side_by_side([red, blue], ["", ""], height=7).shape[0] - 7 == sheet.shape[0] - 40


def test_wrong_sheets_are_refused() -> None:
    with pytest.raises(ValueError, match="got 1 and 2; pair them up"):
        side_by_side([RGB], ["a", "b"])
    with pytest.raises(ValueError, match="got 0 and 0"):
        side_by_side([], [])
    with pytest.raises(ValueError, match="height of at least 1 pixel; got 0"):
        side_by_side([RGB], ["a"], height=0)
    with pytest.raises(ValueError, match="expected uint8 RGB"):
        side_by_side([RGB / 255], ["a"])
