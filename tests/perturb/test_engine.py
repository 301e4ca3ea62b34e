"""Batches are full for any masks, and each reading belongs to its mask."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastfg import Target
from fastfg.perturb import (
    REMOVED,
    Batches,
    Engine,
    Imputed,
    ImputedPixels,
    PatchGrid,
    Paths,
    Pixels,
    View,
    generator,
    image_key,
)
from fastfg.perturb.batches import default_size

GRID = PatchGrid(1, 4, 1, 1)
COUNTS = [4, 1, 6, 0, 9, *[2] * 11]  # masks per view


def halves(images):
    """The class scores are the sums of the two halves of the picture."""
    return torch.stack([images[..., :2].sum((1, 2, 3)), images[..., 2:].sum((1, 2, 3))], 1)


def read_some(engine):
    """Read several views, and compare with images that are perturbed one by one. Returns the progress calls."""
    random = torch.Generator().manual_seed(0)
    images = torch.rand(len(COUNTS), 1, 1, 4, dtype=torch.float64, generator=random)
    fills = torch.rand(len(COUNTS), 1, 1, 1, dtype=torch.float64, generator=random)
    view = torch.arange(len(COUNTS)).repeat_interleave(torch.tensor(COUNTS))
    masks, target, seen = torch.rand(len(view), 4, generator=random) > 0.5, view % 2, []
    views = [View(image, fill) for image, fill in zip(images, fills, strict=True)]
    readings = engine.read(views, view, masks, Target(target).of(torch.zeros(len(view), 2)), seen.append)
    perturbed = [torch.where(mask, fills[v], images[v]) for v, mask in zip(view.tolist(), masks, strict=True)]
    logits = halves(torch.stack(perturbed))
    torch.testing.assert_close(readings.logit, logits.gather(1, target[:, None])[:, 0])
    torch.testing.assert_close(readings.prob, logits.softmax(1).gather(1, target[:, None])[:, 0])
    torch.testing.assert_close(readings.max_prob, logits.softmax(1).amax(1))
    return seen


@pytest.mark.parametrize("batch_size", [1, 3, 7, 100])
def test_readings_belong_to_their_masks_and_batches_are_full(batch_size):
    sizes = []

    def forward(images):
        sizes.append(len(images))
        return halves(images)

    engine = Engine(Pixels(forward, GRID), Batches(batch_size))
    seen = read_some(engine)
    assert sum(sizes) == engine.forwards == seen[-1] == 42
    assert seen == torch.tensor(sizes).cumsum(0).tolist()
    assert all(size == batch_size for size in sizes[:-1])


def test_a_batch_that_does_not_fit_is_run_again_in_halves(caplog):
    sizes = []

    def forward(images):
        if len(images) > 3:
            raise torch.OutOfMemoryError("16 GiB wanted")
        sizes.append(len(images))
        return halves(images)

    engine = Engine(Pixels(forward, GRID), Batches(15))
    read_some(engine)
    assert sum(sizes) == engine.forwards == 42
    assert set(sizes) == {3}
    assert engine.batches.size == 3
    assert "7 images did not fit into memory: continuing with 3" in caplog.text
    rows = []
    engine.whole(torch.rand(5, 1, 1, 4), lambda output, rows_of: rows.append(len(output)))
    assert rows == [3, 2]


def test_views_are_prepared_in_groups_that_fit():
    class Narrow(Pixels):
        def prepare(self, images, fills):
            prepared.append(len(images))
            if len(images) > 2:
                raise torch.OutOfMemoryError("of memory for two")
            return super().prepare(images, fills)

    prepared = []
    engine = Engine(Narrow(halves, GRID), Batches(100))
    read_some(engine)
    assert engine.batches.size == 2
    assert prepared[-1] <= 2


def test_one_image_that_does_not_fit_is_the_devices_own_error():
    def forward(images):
        raise torch.OutOfMemoryError("16 GiB wanted")

    engine = Engine(Pixels(forward, GRID), Batches(4))
    with pytest.raises(torch.OutOfMemoryError, match="16 GiB wanted"):
        read_some(engine)


def test_keys_and_generators():
    a, b = torch.rand(2, 3, 4, 4)
    assert image_key(a) == image_key(a.clone())
    assert image_key(a) != image_key(b)
    assert image_key(a) != image_key(a.reshape(3, 2, 8))

    def draw(*args):
        return torch.rand(3, generator=generator(*args)).tolist()

    assert draw(0, "k", "p") == draw(0, "k", "p")
    assert len({tuple(draw(*args)) for args in [(0, "k", "p"), (1, "k", "p"), (0, "l", "p"), (0, "k", "q")]}) == 4


def kept(images):
    """Reads how many values are not NaN, and their sum: what is left where patches leave."""
    left = ~images.isnan()
    return torch.stack([left.sum((1, 2, 3)).double(), images.nansum((1, 2, 3))], 1)


class Leaving(Pixels):
    """A path for removed views that marks what has left with NaN, and notes the batches."""

    def __init__(self, batches):
        super().__init__(kept, GRID)
        self.batches = batches

    def prepare(self, images, fills):
        assert all(fill is REMOVED for fill in fills)
        return super().prepare(images, [torch.full((1, 1, 1), torch.nan, dtype=torch.float64)] * len(fills))

    def run(self, inputs):
        counts = self.whole(*inputs)[:, 0].tolist()
        assert len(set(counts)) == 1
        self.batches.append((int(counts[0]), len(counts)))
        return super().run(inputs)


def test_each_kind_of_view_has_its_path_and_readings_keep_their_order():
    random = torch.Generator().manual_seed(0)
    images = torch.rand(6, 1, 1, 4, dtype=torch.float64, generator=random)

    def halved(image):
        return Imputed(lambda masks: torch.where(masks[:, None, None], image / 2, image))

    fills = [torch.full((1, 1, 1), 9.0), REMOVED, halved(images[2]), REMOVED, torch.zeros(1, 1, 4), halved(images[5])]
    views = [View(image, fill) for image, fill in zip(images, fills, strict=True)]
    view = torch.arange(6).repeat_interleave(torch.tensor([5, 7, 3, 8, 2, 4]))
    masks, target = torch.rand(len(view), 4, generator=random) > 0.5, view % 2
    batches, seen = [], []
    paths = Paths(Pixels(kept, GRID), ImputedPixels(kept, GRID), Leaving(batches))
    engine = Engine(paths, Batches(3))
    readings = engine.read(views, view, masks, Target(target).of(torch.zeros(len(view), 2)), seen.append)
    for i, (v, mask) in enumerate(zip(view.tolist(), masks, strict=True)):
        other = {1: torch.nan, 3: torch.nan, 2: images[v] / 2, 5: images[v] / 2}.get(v, fills[v])
        expected = kept(torch.where(mask, torch.as_tensor(other), images[v])[None])[0, target[i]]
        torch.testing.assert_close(readings.logit[i], expected)
    assert engine.forwards == len(view) == seen[-1]
    assert seen == sorted(seen)
    assert [left for left, _ in batches] == sorted((left for left, _ in batches), reverse=True)
    assert max(n for left, n in batches if left <= 1) > 3  # short sequences run in larger batches


def test_a_fill_that_makes_other_images_is_an_error():
    image = torch.rand(1, 1, 4)
    views = [View(image, Imputed(lambda masks: image))]
    engine = Engine(Paths(Pixels(kept, GRID), ImputedPixels(kept, GRID)), Batches(3))
    masks = torch.zeros(2, 4, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"images: expected \[2, 1, 1, 4\] from the fill, got \[1, 1, 4\]"):
        engine.read(views, torch.zeros(2, dtype=torch.long), masks, Target(0).of(torch.zeros(2, 2)))


class Names(TorchDispatchMode):
    """Collects the names of the operations."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_batches_do_not_wait_for_the_device():
    """On a GPU, reading a number from a tensor waits until all work before it is done."""
    images, masks = torch.rand(3, 1, 1, 4), torch.rand(60, 4) > 0.5
    views = [View(image, torch.zeros(1, 1, 1)) for image in images]
    view, target = torch.arange(3).repeat_interleave(20), Target(torch.zeros(60, dtype=torch.long))
    found = []
    for batch_size in (60, 2):
        engine = Engine(Pixels(halves, GRID), Batches(batch_size))
        with Names() as mode:
            engine.read(views, view, masks, target.of(torch.zeros(60, 2)), lambda done: None)
        found.append(mode.names)
    assert len(found[1]) > 20 * len(found[0]) / 2
    assert not [name for name in found[1] if name.startswith(("aten._local_scalar_dense", "aten.nonzero"))]


@pytest.mark.parametrize(("n_patches", "size"), [(196, 256), (49, 1024), (1024, 49), (10**6, 1)])
def test_batches_on_a_gpu_hold_the_same_number_of_patches(n_patches, size):
    assert default_size(torch.device("cuda"), n_patches) == size
    assert default_size(torch.device("cpu"), n_patches) == 16
