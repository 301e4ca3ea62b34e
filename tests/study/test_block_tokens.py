"""A block that is added to a study is computed alone, and what is trained from it is the same as if it was there."""

import pytest
import torch

from fastfg.models import adapt
from fastfg.study import token_writer
from fastfg.study.block_tokens import cache_blocks, complete_blocks
from fastfg.study.prepared import Once
from tests.tools import tiny_vit


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(token_writer, "SHARD_BYTES", 4 * 4 * 32 * 4 * 2)  # four images of 4 patches, two blocks


@pytest.fixture
def computed(monkeypatch):
    """The (images, blocks) of each forward pass."""
    found, plain = [], token_writer.residuals
    monkeypatch.setattr(
        token_writer,
        "residuals",
        lambda model, x, layers: found.append((len(x), tuple(layers))) or plain(model, x, layers),
    )
    return found


def caches(folder, wanted, layers, stop=9):
    images = torch.randn(9, 3, 16, 16, generator=torch.Generator().manual_seed(3))

    def parts():
        for i in range(0, 9, 3):
            if i >= stop:
                raise KeyboardInterrupt
            yield images[i : i + 3], [f"image {j}" for j in range(i, i + 3)]

    return cache_blocks(
        adapt(tiny_vit(torch.float32, img_size=(16, 16))),
        parts,
        wanted,
        layers,
        folder / "tokens",
        Once(folder, print),
        seed=5,
    )


def test_only_the_new_block_is_computed_and_its_shards_are_those_of_a_new_study(tmp_path, computed):
    caches(tmp_path / "a", [1], [1])
    first = {file: file.read_bytes() for file in (tmp_path / "a/tokens/1").iterdir()}
    del computed[:]
    grown = caches(tmp_path / "a", [1, 2], [1, 2])
    assert computed == [(3, (2,))] * 3
    assert {file: file.read_bytes() for file in (tmp_path / "a/tokens/1").iterdir()} == first
    fresh = caches(tmp_path / "b", [1, 2], [1, 2])
    assert [(one.name, one.keys) for one in grown[2].shards] == [(one.name, one.keys) for one in fresh[2].shards]
    assert len(fresh[2].shards) == 2
    for block in (1, 2):
        assert torch.equal(grown[block].tokens(block), fresh[block].tokens(block))
    for one, other in zip(grown[2].batches(2, 4, buffer=16), fresh[2].batches(2, 4, buffer=16), strict=True):
        assert torch.equal(one, other)
    del computed[:]
    caches(tmp_path / "a", [2], [1, 2])
    assert not computed


def test_a_new_block_that_was_stopped_goes_on(tmp_path, computed):
    caches(tmp_path, [1], [1])
    with pytest.raises(KeyboardInterrupt):
        caches(tmp_path, [1, 2], [1, 2], stop=3)
    assert list(complete_blocks(tmp_path / "tokens")) == [1]
    del computed[:]
    assert sorted(caches(tmp_path, [1, 2], [1, 2])) == [1, 2]
    assert computed == [(3, (2,))] * 3  # what was stopped wrote no part of a shard
