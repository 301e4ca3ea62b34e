"""Image files are read by the rules in read_image's docstring, and by no silent other rule."""

import re
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, UnidentifiedImageError

from fastfg.data import read_image

RAMP = np.arange(48, dtype=np.uint16).reshape(6, 8)


def read(path, **options):
    """The pixels of a file as [H, W, 3]."""
    return np.asarray(read_image(path, **options).image.convert("RGB"))


def photograph(mode="RGB", size=(8, 6)):
    pixels = np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


@pytest.mark.parametrize(
    ("suffix", "mode"),
    [(suffix, mode) for suffix in ("png", "tif", "bmp") for mode in ("RGB", "L", "P", "1")]
    + [("jpg", "RGB"), ("jpg", "L"), ("jpg", "CMYK"), ("tif", "CMYK")],
)
def test_eight_bits_are_read_as_pillow_reads_them(tmp_path, mode, suffix):
    path = tmp_path / f"a.{suffix}"
    photograph(mode).save(path)
    picture = read_image(path, window=(0.0, 3.0))  # ignored for 8 bits
    assert picture.window is None
    for wanted in ("RGB", "L"):
        with Image.open(path) as image:
            np.testing.assert_array_equal(np.asarray(picture.image.convert(wanted)), np.asarray(image.convert(wanted)))


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("a.png", RAMP),  # 6 bits in a 16-bit file
        ("a.png", RAMP * 80 + 300),  # 12 bits
        ("a.png", RAMP * 1300),  # 16 bits
        ("a.tif", RAMP * 80),
        ("a.tif", (RAMP * 80).astype(">u2")),
        ("a.tif", RAMP.astype(np.int32) * 1000 - 1024),
        ("a.tif", RAMP.astype(np.float32) / 47),
        ("a.tif", RAMP.astype(np.float32) * 1e30 - 1e31),
        ("a.pgm", RAMP * 80),
        ("a.jp2", RAMP * 80),
    ],
)
def test_more_bits_are_read_by_their_own_range(tmp_path, name, values):
    options = {"irreversible": False} if name.endswith("jp2") else {}
    Image.fromarray(values).save(tmp_path / name, **options)
    picture = read_image(tmp_path / name)
    assert picture.window == (float(values.min()), float(values.max()))
    expected = np.round((values.astype(np.float64) - values.min()) / (float(values.max()) - values.min()) * 255)
    np.testing.assert_array_equal(np.asarray(picture.image), expected)
    again = read_image(tmp_path / name)
    np.testing.assert_array_equal(np.asarray(again.image), np.asarray(picture.image))


def test_a_window_is_the_same_for_all_files(tmp_path):
    Image.fromarray(RAMP * 100).save(tmp_path / "a.png")
    picture = read_image(tmp_path / "a.png", window=(1000.0, 2000.0))
    expected = np.round((RAMP * 100.0 - 1000) / 1000 * 255).clip(0, 255)
    np.testing.assert_array_equal(np.asarray(picture.image), expected)
    assert picture.window == (1000, 2000)
    for window in ((2.0, 1.0), (1.0, 1.0), (0.0, float("nan")), (0.0, float("inf"))):
        with pytest.raises(ValueError, match="window: expected LOW HIGH, finite, with LOW < HIGH, got"):
            read_image(tmp_path / "a.png", window=window)


def test_a_constant_image_is_black(tmp_path):
    Image.fromarray(RAMP * 0 + 700).save(tmp_path / "a.png")
    assert read(tmp_path / "a.png").max() == 0


def test_zero_is_white_if_the_file_says_so(tmp_path):
    image = Image.fromarray(RAMP * 80)
    image.save(tmp_path / "dark.tif")
    image.save(tmp_path / "light.tif", tiffinfo={262: 0})
    with Image.open(tmp_path / "light.tif") as opened:
        assert opened.tag_v2[262] == 0
    np.testing.assert_array_equal(read(tmp_path / "light.tif"), 255 - read(tmp_path / "dark.tif"))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nan_and_infinite_pixels_are_an_error(tmp_path, bad):
    values = RAMP.astype(np.float32)
    values[2, 3] = bad
    Image.fromarray(values).save(tmp_path / "a.tif")
    with pytest.raises(ValueError, match="expected finite pixels, got NaN or infinity"):
        read_image(tmp_path / "a.tif", window=(0.0, 1.0))


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width, height, bits, colour, data):
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


@pytest.mark.parametrize(("colour", "channels"), [(2, 3), (6, 4), (4, 2)])
def test_colour_with_sixteen_bits_is_refused(tmp_path, colour, channels):
    rows = b"".join(b"\0" + b"\x01\x00" * channels * 4 for _ in range(4))
    (tmp_path / "a.png").write_bytes(png(4, 4, 16, colour, rows))
    with pytest.raises(ValueError, match="expected 8 bits per channel in (RGB|RGBA|LA), got 16"):
        read_image(tmp_path / "a.png")


def test_colour_tiff_with_sixteen_bits_is_refused(tmp_path):
    photograph().save(tmp_path / "a.tif")
    data = (tmp_path / "a.tif").read_bytes()
    at = data.index(struct.pack("<HHH", 8, 8, 8))
    (tmp_path / "a.tif").write_bytes(data[:at] + struct.pack("<HHH", 16, 16, 16) + data[at + 6 :])
    with pytest.raises(ValueError, match="expected 8 bits per channel in RGB, got 16"):
        read_image(tmp_path / "a.tif")


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_orientation_is_applied(tmp_path, orientation, suffix):
    from PIL import ImageOps

    path, exif = tmp_path / f"a.{suffix}", Image.Exif()
    exif[0x0112] = orientation
    photograph(size=(40, 24)).save(path, exif=exif)
    with Image.open(path) as image:
        expected = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    assert expected.shape == ((24, 40, 3) if orientation < 5 else (40, 24, 3))
    np.testing.assert_array_equal(read(path), expected)


TURNED = {  # what each EXIF orientation asks for
    1: lambda pixels: pixels,
    2: np.fliplr,
    3: lambda pixels: np.rot90(pixels, 2),
    4: np.flipud,
    5: lambda pixels: pixels.swapaxes(0, 1),
    6: lambda pixels: np.rot90(pixels, -1),
    7: lambda pixels: np.rot90(pixels, 2).swapaxes(0, 1),
    8: np.rot90,
}


@pytest.mark.parametrize("compression", ["raw", "tiff_lzw"])
@pytest.mark.parametrize("mode", ["L", "I;16", "F", "RGB"])
@pytest.mark.parametrize("orientation", TURNED)
def test_the_orientation_of_a_tiff_is_applied(tmp_path, orientation, mode, compression):
    grey = np.random.default_rng(0).permutation(256).astype(np.uint8).reshape(8, 32)  # all of 0..255: kept by a window
    pixels = {"L": grey, "I;16": grey.astype(np.uint16), "F": grey.astype(np.float32), "RGB": np.dstack([grey] * 3)}
    image = Image.fromarray(pixels[mode])
    assert image.mode == mode
    image.save(tmp_path / "a.tif", compression=compression, tiffinfo={0x0112: orientation})
    np.testing.assert_array_equal(read(tmp_path / "a.tif"), TURNED[orientation](np.dstack([grey] * 3)))


def test_transparent_pixels_are_white(tmp_path):
    pixels = np.zeros((2, 3, 4), np.uint8)
    pixels[..., 0], pixels[0, :, 3] = 100, (0, 51, 255)
    pixels[1, :, 3] = 255
    Image.fromarray(pixels).save(tmp_path / "a.png")
    assert read(tmp_path / "a.png")[0].tolist() == [[255, 255, 255], [224, 204, 204], [100, 0, 0]]
    grey = Image.merge("LA", [Image.new("L", (2, 2), 10), Image.new("L", (2, 2), 0)])
    grey.save(tmp_path / "grey.png")
    assert (read(tmp_path / "grey.png") == 255).all()
    palette = photograph("P")
    palette.save(tmp_path / "palette.png", transparency=palette.getpixel((0, 0)))
    assert read(tmp_path / "palette.png")[0, 0].tolist() == [255, 255, 255]
    palette.save(tmp_path / "palette.gif", transparency=palette.getpixel((0, 0)))
    assert read(tmp_path / "palette.gif")[0, 0].tolist() == [255, 255, 255]


@pytest.mark.parametrize("window", [None, (300.0, 4000.0)])
def test_transparent_pixels_of_sixteen_bits_are_white(tmp_path, window):
    values = RAMP * 80 + 300
    Image.fromarray(values).save(tmp_path / "opaque.png")
    Image.fromarray(values).save(tmp_path / "a.png", transparency=300)
    picture, opaque = (read_image(tmp_path / name, window=window) for name in ("a.png", "opaque.png"))
    assert picture.window == opaque.window
    expected = np.array(opaque.image)
    assert expected[0, 0] == 0
    expected[0, 0] = 255
    np.testing.assert_array_equal(np.asarray(picture.image), expected)
    Image.fromarray(RAMP * 0 + 700).save(tmp_path / "constant.png", transparency=700)
    assert (read(tmp_path / "constant.png") == 255).all()


def test_opaque_alpha_changes_nothing(tmp_path):
    photograph("RGBA").save(tmp_path / "a.png")
    np.testing.assert_array_equal(read(tmp_path / "a.png"), np.asarray(photograph()))


@pytest.mark.parametrize("suffix", ["gif", "tif", "png", "webp"])
def test_several_frames_are_refused(tmp_path, suffix):
    frames = [photograph(), Image.new("RGB", (8, 6), "red"), Image.new("RGB", (8, 6), "blue")]
    frames[0].save(tmp_path / f"a.{suffix}", save_all=True, append_images=frames[1:])
    with pytest.raises(ValueError, match="expected one frame or page, got several"):
        read_image(tmp_path / f"a.{suffix}")
    frames[0].save(tmp_path / f"b.{suffix}", save_all=True)
    assert read(tmp_path / f"b.{suffix}").shape == (6, 8, 3)


def test_a_photograph_with_previews_is_read(tmp_path):
    photograph().save(tmp_path / "a.jpg", format="MPO", save_all=True, append_images=[Image.new("RGB", (4, 3))])
    assert read(tmp_path / "a.jpg").shape == (6, 8, 3)


def test_sizes_are_checked_before_pixels_are_decoded(tmp_path, monkeypatch):
    bomb = tmp_path / "bomb.png"
    bomb.write_bytes(png(60_000, 1, 8, 0, b"\0" * 60_001))
    assert bomb.stat().st_size < 254
    Image.new("L", (1000, 100)).save(tmp_path / "large.png")
    huge = tmp_path / "huge.png"
    huge.write_bytes(png(65_000, 65_000, 1, 0, b""))
    near = tmp_path / "near.png"
    near.write_bytes(png(12_500, 12_500, 1, 0, b""))
    from PIL import ImageFile

    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda image: pytest.fail("decoded"))
    with pytest.raises(ValueError, match=r"expected sides of at most 50 to 1 \(max_aspect\), got 60000 x 1 pixels"):
        read_image(bomb)
    with pytest.raises(ValueError, match=r"expected at most 99,999 pixels \(max_pixels\), got 1000 x 100"):
        read_image(tmp_path / "large.png", max_pixels=99_999)
    with pytest.raises(ValueError, match="sides of at most 9.5 to 1"):
        read_image(tmp_path / "large.png", max_aspect=9.5)
    with pytest.raises(ValueError, match=r"expected at most 150,000,000 pixels \(max_pixels\), got 12500 x 12500"):
        read_image(near)
    with pytest.raises(Image.DecompressionBombError):
        read_image(huge)
    monkeypatch.undo()
    assert read_image(tmp_path / "large.png", max_pixels=100_000, max_aspect=10).image.size == (1000, 100)


@pytest.mark.filterwarnings("error")
def test_a_large_photograph_gives_no_bomb_warning(tmp_path):
    Image.new("1", (11_648, 8_736)).save(tmp_path / "a.png")  # 102 megapixels: Pillow warns
    assert read_image(tmp_path / "a.png").image.size == (11_648, 8_736)


def test_the_content_decides_and_not_the_name(tmp_path):
    photograph().save(tmp_path / "a.png")
    (tmp_path / "a.png").rename(tmp_path / "a.jpg")
    assert read(tmp_path / "a.jpg").shape == (6, 8, 3)
    (tmp_path / "scan.png").write_bytes(b"\0" * 128 + b"DICM" + b"\0" * 100)
    with pytest.raises(ValueError, match="a DICOM object without Rows and Columns"):
        read_image(tmp_path / "scan.png")
    photograph().save(tmp_path / "a.eps")
    named = re.escape(f"cannot identify image file {str(tmp_path / 'a.eps')!r}")
    with pytest.raises(UnidentifiedImageError, match=named):  # it would run Ghostscript
        read_image(tmp_path / "a.eps")
