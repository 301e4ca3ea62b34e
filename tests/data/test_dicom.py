"""DICOM files: values of the modality, windows, padding, colour, and what is refused."""

import io
import warnings

import numpy as np
import pytest
from PIL import Image

from fastfg.data import dicom, find_images, read_image

pydicom = pytest.importorskip("pydicom")
from pydicom.dataset import Dataset, FileMetaDataset  # noqa: E402
from pydicom.encaps import encapsulate  # noqa: E402
from pydicom.uid import ExplicitVRLittleEndian, JPEGBaseline8Bit, RLELossless  # noqa: E402

RAMP = np.arange(12, dtype=np.int16).reshape(3, 4) * 100  # 0 to 1100


def dataset(pixels, kind="MONOCHROME2", **elements):
    data = Dataset()
    data.file_meta = FileMetaDataset()
    data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data.SOPClassUID, data.SOPInstanceUID = "1.2.840.10008.5.1.4.1.1.2", "1.2.3"
    data.Rows, data.Columns = pixels.shape[:2]
    data.SamplesPerPixel = 3 if pixels.ndim == 3 else 1
    if pixels.ndim == 3:
        data.PlanarConfiguration = 0
    data.PhotometricInterpretation = kind
    bits = 8 * pixels.dtype.itemsize
    data.BitsAllocated, data.BitsStored, data.HighBit = bits, bits, bits - 1
    data.PixelRepresentation = int(pixels.dtype.kind == "i")
    data.PixelData = pixels.tobytes()
    for name, value in elements.items():
        setattr(data, name, value)
    return data


def read(tmp_path, data, **options):
    file = tmp_path / "image"  # told by its content, whatever its name
    data.save_as(file, enforce_file_format=True)
    picture = read_image(file, **options)
    return np.asarray(picture.image), picture.window


def expected(values, low, high):
    return ((values.astype(float) - low) / (high - low) * 255).round().clip(0, 255)


def test_values_and_the_files_own_window(tmp_path):
    data = dataset(
        RAMP, RescaleSlope="2", RescaleIntercept="-1000", WindowCenter=["40.5", "9"], WindowWidth=["401", "9"]
    )
    found, window = read(tmp_path, data)
    assert window == (-160, 240)
    np.testing.assert_allclose(found, expected(2.0 * RAMP - 1000, -160, 240), atol=1)
    found, window = read(tmp_path, data, window=(-1000, 1200))
    assert window == (-1000, 1200)
    np.testing.assert_allclose(found, expected(2.0 * RAMP - 1000, -1000, 1200), atol=1)
    data.VOILUTFunction = "LINEAR_EXACT"
    assert read(tmp_path, data)[1] == (-160, 241)


def test_without_a_window(tmp_path):
    found, window = read(tmp_path, dataset(RAMP))
    assert window == (0, 1100)
    np.testing.assert_array_equal(found, expected(RAMP, 0, 1100))
    inverted, _ = read(tmp_path, dataset(RAMP, "MONOCHROME1"))
    np.testing.assert_array_equal(inverted, 255 - found)


@pytest.mark.parametrize("options", [{}, {"RescaleSlope": "1", "RescaleIntercept": "0"}])
def test_8_bits_are_used_unchanged(tmp_path, options):
    pixels = np.array([[3, 200], [7, 90]], np.uint8)
    found, window = read(tmp_path, dataset(pixels, **options))
    assert window is None
    np.testing.assert_array_equal(found, pixels)


def test_padding_is_black_and_does_not_count(tmp_path):
    pixels = RAMP.copy()
    pixels[0, 0] = -2000
    found, window = read(tmp_path, dataset(pixels, PixelPaddingValue=-2000))
    assert window == (100, 1100)
    np.testing.assert_array_equal(found.flat[1:], expected(RAMP, 100, 1100).flat[1:])
    for kind in ("MONOCHROME1", "MONOCHROME2"):
        assert read(tmp_path, dataset(pixels, kind, PixelPaddingValue=-2000))[0][0, 0] == 0


@pytest.mark.parametrize(("dtype", "given"), [("int16", 2**16 - 2000), ("uint16", -2000)])
def test_padding_has_either_sign(tmp_path, dtype, given):
    pixels = RAMP.astype(dtype)
    pixels[0, 0] = np.array(-2000).astype(dtype)
    data = dataset(pixels)
    data.add_new("PixelPaddingValue", "US" if given > 0 else "SS", given)
    found, window = read(tmp_path, data)
    assert window == (100, 1100)
    assert found[0, 0] == 0


def test_a_rescale_may_have_one_part(tmp_path):
    assert read(tmp_path, dataset(RAMP, RescaleIntercept="-1000"))[1] == (-1000, 100)
    assert read(tmp_path, dataset(RAMP, RescaleSlope="2"))[1] == (0, 2200)


def test_empty_elements_are_as_none(tmp_path):
    names = ("RescaleSlope", "RescaleIntercept", "WindowCenter", "WindowWidth", "PixelPaddingValue", "VOILUTFunction")
    found, window = read(tmp_path, dataset(RAMP, NumberOfFrames=None, VOILUTSequence=[], **dict.fromkeys(names)))
    assert window == (0, 1100)
    np.testing.assert_array_equal(found, expected(RAMP, 0, 1100))
    windowed = dataset(RAMP, WindowCenter="500.5", WindowWidth="501", VOILUTFunction="")
    assert read(tmp_path, windowed)[1] == (250, 750)


@pytest.mark.filterwarnings("error")
def test_nothing_is_warned_of(tmp_path):
    data = dataset(RAMP)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        data.PatientName = "x" * 200
        data.save_as(tmp_path / "long", enforce_file_format=True)
    assert np.asarray(read_image(tmp_path / "long").image).shape == (3, 4)


def test_colour_and_compression(tmp_path):
    photo = np.asarray(Image.linear_gradient("L").resize((32, 32)).convert("RGB")) * np.array([1, 0.5, 0.2])
    photo = photo.astype(np.uint8)
    np.testing.assert_array_equal(read(tmp_path, dataset(photo, "RGB"))[0], photo)
    data = dataset(photo, "YBR_FULL_422")
    buffer = io.BytesIO()
    Image.fromarray(photo).save(buffer, "JPEG", quality=95)
    data.PixelData, data.file_meta.TransferSyntaxUID = encapsulate([buffer.getvalue()]), JPEGBaseline8Bit
    data["PixelData"].VR = "OB"
    found, window = read(tmp_path, data)
    assert window is None
    assert np.abs(found.astype(int) - photo).mean() < 3
    data = dataset(RAMP)
    data.compress(RLELossless)
    np.testing.assert_array_equal(read(tmp_path, data)[0], expected(RAMP, 0, 1100))


@pytest.mark.parametrize(
    ("elements", "message"),
    [
        ({"NumberOfFrames": 3}, "expected one frame, got 3"),
        ({"SharedFunctionalGroupsSequence": [Dataset()]}, "expected a classic DICOM image, got an enhanced one"),
        ({"PhotometricInterpretation": "PALETTE COLOR"}, "expected one of .* got PALETTE COLOR with 1 samples"),
        (
            {"WindowCenter": "1", "WindowWidth": "5", "VOILUTFunction": "SIGMOID"},
            "window: expected LOW HIGH .* SIGMOID",
        ),
        ({"VOILUTSequence": [Dataset()]}, "window: expected LOW HIGH for a file whose own one is a table"),
        ({"Rows": 20000, "Columns": 20000}, "expected at most 150,000,000 pixels"),
        ({"WindowCenter": "1", "WindowWidth": "1"}, "window: expected LOW HIGH .*LINEAR with width 1, got none"),
        ({"WindowCenter": "1e400", "WindowWidth": "5"}, "window: expected LOW HIGH .*of inf, LINEAR"),
        ({"WindowCenter": ["", "5"], "WindowWidth": "5"}, "window: expected LOW HIGH .*of nan, LINEAR"),
        ({"BitsStored": 12, "HighBit": 15}, r"expected values in the lower bits \(HighBit 11\), got HighBit 15"),
        ({"PresentationLUTShape": "INVERSE"}, "expected MONOCHROME2 that is not inverted"),
        ({"PhotometricInterpretation": "YBR_RCT", "SamplesPerPixel": 3}, "expected YBR_RCT in JPEG 2000"),
        ({"PixelData": RAMP.tobytes() * 2}, r"expected 3 x 4 pixels in one frame, got \[2, 3, 4\]"),
        ({"Rows": None}, "without Rows and Columns"),
        ({"PixelData": None}, "without PixelData"),
    ],
)
def test_what_is_not_applied_is_refused(tmp_path, elements, message):
    data = dataset(RAMP, **{name: value for name, value in elements.items() if value is not None})
    for name in [name for name, value in elements.items() if value is None]:
        delattr(data, name)
    with pytest.raises(ValueError, match=message):
        read(tmp_path, data)


def test_deflated_files_are_refused(tmp_path):
    data = dataset(RAMP)
    data.file_meta.TransferSyntaxUID = pydicom.uid.DeflatedExplicitVRLittleEndian
    with pytest.raises(ValueError, match="not deflated"):
        read(tmp_path, data)


@pytest.mark.filterwarnings("ignore")
def test_every_tenth_byte_cut_off_is_an_error(tmp_path):
    file = tmp_path / "whole"
    dataset(RAMP, WindowCenter="40", WindowWidth="400").save_as(file, enforce_file_format=True)
    whole = file.read_bytes()
    for length in range(140, len(whole), 10):
        file.write_bytes(whole[:length])
        with pytest.raises(Exception):  # noqa: B017, PT011
            read_image(file)


def test_folders(tmp_path, monkeypatch):
    dataset(RAMP).save_as(tmp_path / "IM0001", enforce_file_format=True)
    dataset(RAMP).save_as(tmp_path / "b.dcm", enforce_file_format=True)
    assert [path.name for path in find_images([tmp_path]).paths] == ["IM0001", "b.dcm"]
    monkeypatch.setattr(dicom.importlib.util, "find_spec", lambda name: None)
    found = find_images([tmp_path])
    assert found.paths == []
    assert {error.message for error in found.skipped} == {"DICOM needs pydicom: pip install 'fastfg[dicom]'"}
    with pytest.raises(ImportError, match="fastfg\\[dicom\\]"):
        read_image(tmp_path / "b.dcm")
