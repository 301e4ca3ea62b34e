"""Masks from files: which pixels are inside, and the same geometry as the image."""

import numpy as np
import pytest
import torch
from PIL import Image

from fastfg.data import batches, read_image, read_mask
from fastfg.models.timm import import_timm


def grey(image):
    """A transform without geometry: [1, H, W], normalised."""
    return (torch.from_numpy(np.asarray(image.convert("L"), dtype=np.float32)) / 255 - 0.4)[None] / 0.3


@pytest.fixture(scope="module")
def timms():
    """timm's evaluation transform: resizes the shorter side to 62, bicubic, and crops 56 x 56 from the middle."""
    import_timm()
    from timm.data import create_transform

    mean, std = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
    return create_transform((3, 56, 56), crop_pct=0.9, interpolation="bicubic", mean=mean, std=std)


def blob(height=90, width=140):
    """An object that no symmetry maps to itself."""
    y, x = np.mgrid[:height, :width]
    inside = ((x - 50) / 30.0) ** 2 + ((y - 35) / 17.0) ** 2 < 1
    inside[60:80, 80:120] = True
    return inside


@pytest.fixture
def files(tmp_path):
    """A black and white picture of the object, and its mask."""
    inside = blob()
    Image.fromarray(np.where(inside, 255, 0).astype(np.uint8)).convert("RGB").save(tmp_path / "image.png")
    Image.fromarray(inside.astype(np.uint8)).save(tmp_path / "mask.png")
    return tmp_path


def test_a_mask_goes_where_the_image_goes(files, timms):
    """The picture itself, after the transform and without its normalisation, is the mask."""
    image = read_image(files / "image.png").image
    mask = read_mask(files / "mask.png", timms, image.size)
    pixels = timms(image) * torch.tensor([0.2, 0.25, 0.3])[:, None, None] + torch.tensor([0.4, 0.5, 0.6])[:, None, None]
    assert mask.shape == (56, 56)
    assert mask.dtype == torch.float32
    for channel in pixels:
        torch.testing.assert_close(mask, channel.clamp(0, 1), rtol=0, atol=1e-5)
    nearest = Image.fromarray(blob()).resize((96, 62), Image.Resampling.NEAREST).crop((20, 3, 76, 59))
    assert float(((mask > 0.5) != torch.from_numpy(np.array(nearest))).float().mean()) < 0.01  # at the borders alone


def test_the_bright_pixels_of_a_photograph(tmp_path, timms):
    datasets = pytest.importorskip("sklearn.datasets")
    photo = datasets.load_sample_image("flower.jpg")
    bright = photo.mean(-1) > 110
    Image.fromarray(photo).save(tmp_path / "photo.png")
    Image.fromarray(np.where(bright, 255, 0).astype(np.uint8)).save(tmp_path / "mask.png")
    image = read_image(tmp_path / "photo.png").image
    mask = read_mask(tmp_path / "mask.png", timms, image.size) > 0.5
    scale, shift = torch.tensor([0.2, 0.25, 0.3]), torch.tensor([0.4, 0.5, 0.6])
    seen = (timms(image) * scale[:, None, None] + shift[:, None, None]).mean(0) > 110 / 255
    assert 0.1 < float(mask.float().mean()) < 0.9
    agree = float((mask == seen).float().mean())
    assert agree > 0.95
    for moved in (mask.roll(2, 0), mask.roll(-2, 0), mask.roll(2, 1), mask.roll(-2, 1), mask.flip(0), mask.flip(1)):
        assert float((moved == seen).float().mean()) < agree - 0.01


@pytest.mark.parametrize("orientation", [2, 3, 5, 6, 8])
def test_exif_orientation(tmp_path, orientation):
    inside = blob()
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.where(inside, 255, 0).astype(np.uint8)).save(tmp_path / "image.png", exif=exif)
    Image.fromarray(inside.astype(np.uint8)).save(tmp_path / "mask.png", exif=exif)
    image = read_image(tmp_path / "image.png").image
    mask = read_mask(tmp_path / "mask.png", grey, image.size)
    assert torch.equal(mask == 1, torch.from_numpy(np.array(image) == 255))
    if orientation > 4:  # the sides are exchanged: a mask that lacks the tag does not fit
        Image.fromarray(inside.astype(np.uint8)).save(tmp_path / "mask.png")
        with pytest.raises(ValueError, match="mask: expected 90 x 140 pixels, as the image has, got 140 x 90"):
            read_mask(tmp_path / "mask.png", grey, image.size)


def save(path, values, mode=None):
    image = Image.fromarray(np.array(values, dtype=np.uint8))
    (image if mode is None else image.convert(mode)).save(path)
    return path


def test_which_pixels_are_inside(tmp_path):
    labels = [[0, 1, 2], [3, 0, 2]]
    file = save(tmp_path / "a.png", labels)
    options = {"transform": grey, "size": (3, 2)}
    assert read_mask(file, **options).tolist() == [[0, 1, 1], [1, 0, 1]]
    assert read_mask(file, label=2, **options).tolist() == [[0, 0, 1], [0, 0, 1]]
    assert read_mask(file, label=(1, 3), **options).tolist() == [[0, 1, 0], [1, 0, 0]]
    assert read_mask(file, label=0, **options).tolist() == [[1, 0, 0], [0, 1, 0]]
    assert read_mask(file, label=9, **options).tolist() == [[0, 0, 0], [0, 0, 0]]


def test_palettes_bits_and_deep_files(tmp_path):
    options = {"transform": grey, "size": (3, 2)}
    palette = Image.fromarray(np.array([[0, 1, 2], [3, 0, 2]], dtype=np.uint8), mode="P")
    palette.putpalette([255, 255, 255, 0, 0, 0, 9, 9, 9, 1, 2, 3])  # the background is white, label 1 is black
    palette.save(tmp_path / "palette.png")
    assert read_mask(tmp_path / "palette.png", **options).tolist() == [[0, 1, 1], [1, 0, 1]]
    assert read_mask(tmp_path / "palette.png", label=1, **options).tolist() == [[0, 1, 0], [0, 0, 0]]
    Image.fromarray(np.array([[False, True, True], [True, False, True]])).save(tmp_path / "bits.png")
    assert read_mask(tmp_path / "bits.png", **options).tolist() == [[0, 1, 1], [1, 0, 1]]
    Image.fromarray(np.array([[0, 1, 2], [3, 0, 40000]], dtype=np.uint16)).save(tmp_path / "deep.png")
    assert read_mask(tmp_path / "deep.png", label=40000, **options).tolist() == [[0, 0, 0], [0, 0, 1]]
    opaque = save(tmp_path / "opaque.png", [[0, 255, 255], [255, 0, 255]], "RGBA")
    assert read_mask(opaque, **options).tolist() == [[0, 1, 1], [1, 0, 1]]
    assert read_mask(save(tmp_path / "la.png", [[0, 9, 9], [9, 0, 9]], "LA"), **options).tolist()[0] == [0, 1, 1]


def test_refused_files(tmp_path):
    options = {"transform": grey, "size": (3, 2)}
    with pytest.raises(ValueError, match="mask: expected a file without loss .*, got JPEG"):
        read_mask(save(tmp_path / "a.jpg", [[0, 255, 0], [0, 0, 0]]), **options)
    colours = np.zeros((2, 3, 3))
    colours[0, 0, 0] = 200
    with pytest.raises(ValueError, match=r"mask: expected one value per pixel, got colours \(RGB\)"):
        read_mask(save(tmp_path / "rgb.png", colours), **options)
    half = np.full((2, 3, 4), 128)
    with pytest.raises(ValueError, match="mask: expected no transparency, got transparent pixels"):
        read_mask(save(tmp_path / "rgba.png", half), **options)
    with pytest.raises(ValueError, match="mask: expected 3 x 2 pixels, as the image has, got 4 x 2"):
        read_mask(save(tmp_path / "wide.png", np.zeros((2, 4))), **options)
    with pytest.raises(ValueError, match="transform: expected one that maps brightness linearly"):
        read_mask(save(tmp_path / "b.png", np.zeros((2, 3))), lambda image: grey(image).exp(), (3, 2))


class RandomShift:
    """Moves the picture by random pixels; with ``seed``, by a generator of its own."""

    def __init__(self, seed=None, p=1.0):
        self.own, self.p = None if seed is None else np.random.default_rng(seed), p

    def __call__(self, image):
        draw = self.own.random if self.own else np.random.random
        return image.rotate(90 * int(8 * draw())) if draw() < self.p else image


def test_random_transforms_are_refused_by_name(tmp_path):
    """Also where the geometry is by chance the same: the generator has moved on."""
    import random

    file = save(tmp_path / "a.png", np.arange(35).reshape(5, 7) % 3 == 0)
    shift, own, never = RandomShift(), RandomShift(seed=0), RandomShift(p=0.0)

    def plain(image):
        return grey(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if random.random() < 1e-9 else image)

    def drawn(image):
        return grey(image) if float(torch.rand(())) < 2 else None

    for transform, name in (
        (lambda image: grey(shift(image)), "RandomShift"),
        (lambda image: grey(own(image)), "RandomShift"),
        (lambda image: grey(never(image)), "RandomShift"),
        (plain, "one that draws random numbers"),
        (drawn, "one that draws random numbers"),
    ):
        expected = f"transform: expected one without random parts, .* got {name}$"
        with pytest.raises(ValueError, match=expected):
            read_mask(file, transform, (7, 5))


def test_timms_training_transform_is_refused(files):
    from timm.data import create_transform

    training = create_transform((3, 56, 56), is_training=True, hflip=0.5)
    with pytest.raises(ValueError, match="transform: expected one without random parts, .* got .*RandomResizedCrop"):
        read_mask(files / "mask.png", training, (140, 90))


def test_padding_is_outside(tmp_path):
    file = save(tmp_path / "a.png", np.ones((2, 3)))
    mask = read_mask(file, lambda image: torch.nn.functional.pad(grey(image), (1, 1, 0, 0), value=7.0), (3, 2))
    assert mask.tolist() == [[0, 1, 1, 1, 0]] * 2


def test_batches_with_masks(files):
    from shutil import copy

    for name in ("second.png", "lonely.png", "unlike.png"):
        copy(files / "image.png", files / name)
    save(files / "small.png", np.zeros((2, 3)))
    paths = [files / name for name in ("image.png", "lonely.png", "unlike.png", "second.png")]
    masks = {files / "image.png": files / "mask.png", files / "second.png": files / "mask.png"}
    masks[files / "unlike.png"] = files / "small.png"
    (batch,) = batches(paths, grey, 4, masks=masks)
    assert batch.paths == [paths[0], paths[3]]
    assert batch.images.shape == (2, 1, 90, 140)
    assert batch.masks.shape == (2, 90, 140)
    assert torch.equal(batch.masks[1].bool(), torch.from_numpy(blob()))
    assert {error.path.name: error.message for error in batch.errors} == {
        "lonely.png": "ValueError: masks: expected a file for this image, got none",
        "unlike.png": "ValueError: mask: expected 140 x 90 pixels, as the image has, got 3 x 2",
    }
    (empty,) = batches(paths, grey, 4, masks=masks, label=5)
    assert not empty.masks.any()
    (plain,) = batches(paths[:1], grey, 4)
    assert plain.masks is None
