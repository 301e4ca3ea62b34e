"""Full batches whatever is submitted, and every reading in its place."""

import pytest
import torch

from fastfg.perturb import Engine, PatchGrid, Pixels, generator, image_key

GRID = PatchGrid(1, 4, 1, 1)


def halves(images):
    """The class scores are the sums of the two halves of the picture."""
    return torch.stack([images[..., :2].sum((1, 2, 3)), images[..., 2:].sum((1, 2, 3))], 1)


def submit_some(engine):
    """Two submissions of several views, and what the readings should be, by the images themselves."""
    asked = []
    for seed, counts in enumerate([[4, 1, 6, 0, 9], [2] * 11]):
        random = torch.Generator().manual_seed(seed)
        images = torch.rand(len(counts), 1, 1, 4, dtype=torch.float64, generator=random)
        fills = list(torch.rand(len(counts), 1, 1, 1, dtype=torch.float64, generator=random))
        view = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
        masks, target = torch.rand(len(view), 4, generator=random) > 0.5, view % 2
        perturbed = torch.stack(
            [torch.where(mask, fills[v], images[v]) for v, mask in zip(view.tolist(), masks, strict=True)]
        )
        asked.append((engine.submit(images, fills, view, target, masks), halves(perturbed), target))
    engine.flush()
    return asked


def check(asked):
    for readings, logits, target in asked:
        torch.testing.assert_close(readings.logit, logits.gather(1, target[:, None])[:, 0])
        torch.testing.assert_close(readings.prob, logits.softmax(1).gather(1, target[:, None])[:, 0])
        torch.testing.assert_close(readings.max_prob, logits.softmax(1).amax(1))


@pytest.mark.parametrize("batch_size", [1, 3, 7, 100])
def test_readings_belong_to_their_masks_and_batches_are_full(batch_size):
    sizes = []

    def forward(images):
        sizes.append(len(images))
        return halves(images)

    engine = Engine(Pixels(forward, GRID), batch_size)
    check(submit_some(engine))
    assert sum(sizes) == engine.forwards == 42
    assert all(size == batch_size for size in sizes[:-1])


def test_a_batch_that_does_not_fit_is_run_again_in_halves(caplog):
    sizes = []

    def forward(images):
        if len(images) > 3:
            raise torch.OutOfMemoryError("16 GiB wanted")
        sizes.append(len(images))
        return halves(images)

    engine = Engine(Pixels(forward, GRID), 15)
    check(submit_some(engine))
    assert sum(sizes) == engine.forwards == 42
    assert set(sizes) <= {3, 1, 2}
    assert engine.batch_size == 3
    assert "7 perturbed images did not fit into memory: going on with 3" in caplog.text
    assert len(engine.logits(torch.rand(5, 1, 1, 4))) == 5


def test_one_image_that_does_not_fit_is_the_devices_own_error():
    def forward(images):
        raise torch.OutOfMemoryError("16 GiB wanted")

    engine = Engine(Pixels(forward, GRID), 4)
    with pytest.raises(torch.OutOfMemoryError, match="16 GiB wanted"):
        submit_some(engine)


def test_keys_and_generators():
    a, b = torch.rand(2, 3, 4, 4)
    assert image_key(a) == image_key(a.clone())
    assert image_key(a) != image_key(b)
    assert image_key(a) != image_key(a.reshape(3, 2, 8))

    def draw(*args):
        return torch.rand(3, generator=generator(*args)).tolist()

    assert draw(0, "k", "p") == draw(0, "k", "p")
    assert len({tuple(draw(*args)) for args in [(0, "k", "p"), (1, "k", "p"), (0, "l", "p"), (0, "k", "q")]}) == 4
