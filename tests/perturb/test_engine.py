"""Full batches whatever is submitted, and every reading in its place."""

import pytest
import torch

from fastfg.perturb import Engine, PatchGrid, generator, image_key


@pytest.mark.parametrize("batch_size", [1, 3, 7, 100])
def test_readings_belong_to_their_masks_and_batches_are_full(batch_size):
    sizes = []

    def forward(images):  # the class scores are the sums of the two halves of the picture
        sizes.append(len(images))
        return torch.stack([images[..., :2].sum((1, 2, 3)), images[..., 2:].sum((1, 2, 3))], 1)

    engine = Engine(forward, PatchGrid(1, 4, 1, 1), batch_size)
    images = torch.rand(5, 1, 1, 4, dtype=torch.float64)
    counts, fills, asked = [4, 1, 6, 0, 9], torch.rand(5).double(), []
    for image, n, fill, target in zip(images, counts, fills, [0, 1, 0, 1, 1], strict=True):
        masks = torch.rand(n, 4) > 0.5
        asked.append((image, masks, fill, target, engine.submit(image, target, masks, fill)))
    engine.flush()
    for image, masks, fill, target, readings in asked:
        logits = forward(torch.where(masks[:, None, None], fill, image))
        torch.testing.assert_close(readings.logit, logits[:, target])
        torch.testing.assert_close(readings.prob, logits.softmax(1)[:, target])
        torch.testing.assert_close(readings.max_prob, logits.softmax(1).amax(1))
    run = sizes[: -len(asked)]
    assert sum(run) == engine.run == 20
    assert all(size == batch_size for size in run[:-1])


def test_keys_and_generators():
    a, b = torch.rand(2, 3, 4, 4)
    assert image_key(a) == image_key(a.clone())
    assert image_key(a) != image_key(b)
    assert image_key(a) != image_key(a.reshape(3, 2, 8))

    def draw(*args):
        return torch.rand(3, generator=generator(*args)).tolist()

    assert draw(0, "k", "p") == draw(0, "k", "p")
    assert len({tuple(draw(*args)) for args in [(0, "k", "p"), (1, "k", "p"), (0, "l", "p"), (0, "k", "q")]}) == 4
