"""Tokens on disk are those of the model, each image's once, whatever stopped the run before."""

import json
import subprocess
import sys

import pytest
import torch

import fastfg
from fastfg.files import temporary
from fastfg.study import TokenCache, cache_tokens
from fastfg.study import token_writer as module
from tests.tools import tiny_vit

LAYERS = [1, 2]


@pytest.fixture
def model():
    return tiny_vit(torch.float32)


@pytest.fixture
def images():
    return torch.randn(9, 3, 32, 48, generator=torch.Generator().manual_seed(3))


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(module, "SHARD_BYTES", 4 * 24 * 32 * 4 * 2)  # four images, two layers


def parts(images, n=3):
    return [(images[i : i + n], [f"image {j}" for j in range(i, min(i + n, len(images)))]) for i in range(0, 9, n)]


def test_the_tokens_are_the_models(model, images, tmp_path):
    seen = []
    cache = cache_tokens(model, parts(images), LAYERS, tmp_path / "cache", progress=seen.append)
    assert seen == [3, 6, 9]
    assert cache.keys == [f"image {i}" for i in range(9)]
    assert (cache.layers, cache.width, cache.n_tokens) == ((1, 2), 32, 9 * 24)
    assert len(cache.shards) == 2
    expected = fastfg.residuals(model, images, LAYERS)
    for layer in LAYERS:
        torch.testing.assert_close(cache.tokens(layer), expected[layer].flatten(0, 1), rtol=1e-5, atol=1e-5)
        some = cache.tokens(layer, keys=["image 4", "image 8"])
        torch.testing.assert_close(some, expected[layer][[4, 8]].flatten(0, 1), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match=r"layer: expected one of \(1, 2\), .* got 3"):
        cache.tokens(3)


def test_patches_are_drawn_by_the_images_key(model, images, tmp_path):
    first = cache_tokens(model, parts(images), LAYERS, tmp_path / "a", tokens_per_image=5)
    turned = [(batch.flip(0), keys[::-1]) for batch, keys in parts(images, 9)]
    second = cache_tokens(model, turned, LAYERS, tmp_path / "b", tokens_per_image=5)
    for i in range(9):
        one, other = (cache.tokens(2, keys=[f"image {i}"]) for cache in (first, second))
        assert len(one) == 5
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


class Stop(Exception):  # noqa: N818
    pass


@pytest.mark.parametrize("after", [0, 1, 2])
def test_a_run_that_was_stopped_goes_on(model, images, tmp_path, after, monkeypatch):
    def stopped():
        yield from parts(images)[:after]
        raise Stop

    with pytest.raises(Stop):
        cache_tokens(model, stopped(), LAYERS, tmp_path)
    computed = []
    plain = module.residuals
    monkeypatch.setattr(module, "residuals", lambda m, x, layers: computed.append(len(x)) or plain(m, x, layers))
    cache = cache_tokens(model, parts(images), LAYERS, tmp_path)
    assert sum(computed) == 9 - 3 * after
    assert sorted(cache.keys) == [f"image {i}" for i in range(9)]
    expected = fastfg.residuals(model, images, [1])[1]
    torch.testing.assert_close(cache.tokens(1, ["image 7"]), expected[7], rtol=1e-5, atol=1e-5)


def test_a_kill_between_a_shard_and_its_line(model, images, tmp_path):
    """The shard is there, and its line is missing or torn: its images are computed again."""
    cache_tokens(model, parts(images), LAYERS, tmp_path)
    index = tmp_path / "shards.jsonl"
    whole = index.read_text()
    for torn in (whole[: whole.index("\n") + 1], whole[:-20], whole[:20], ""):
        index.write_text(torn)
        assert len(TokenCache(tmp_path).keys) < 9
        cache = cache_tokens(model, parts(images), LAYERS, tmp_path)
        assert sorted(cache.keys) == [f"image {i}" for i in range(9)]
        assert all(json.loads(line) for line in index.read_text().splitlines())


def test_the_same_image_twice_is_there_once(model, images, tmp_path):
    cache = cache_tokens(model, [(images[[0, 1, 0]], None), (images[[1, 2]], None)], LAYERS, tmp_path)
    assert len(cache.keys) == 3
    assert len(set(cache.keys)) == 3


def test_limits_and_wrong_folders(model, images, tmp_path):
    with pytest.raises(
        ValueError, match=r"max_bytes: expected room for more than 4 images, got 30000 bytes.* takes 6144"
    ):
        cache_tokens(model, parts(images), LAYERS, tmp_path / "full", max_bytes=30_000)
    assert len(TokenCache(tmp_path / "full").keys) == 4  # of the batch of three that no longer fits, the first
    with pytest.raises(ValueError, match=r"folder: expected tokens made with seed=1, got seed=0 in"):
        cache_tokens(model, parts(images), LAYERS, tmp_path / "full", seed=1)
    with pytest.raises(ValueError, match="folder: expected tokens of this model's weights, got those of others in"):
        cache_tokens(tiny_vit(torch.float32, seed=4), parts(images), LAYERS, tmp_path / "full")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.txt").write_text("notes")
    with pytest.raises(ValueError, match="folder: expected a new or empty folder, or one with tokens, got"):
        cache_tokens(model, parts(images), LAYERS, tmp_path / "other")
    with pytest.raises(FileNotFoundError, match=r"folder: expected a folder with tokens.json, got"):
        TokenCache(tmp_path / "other")
    with pytest.raises(ValueError, match="batches: expected at least one image, got none"):
        cache_tokens(model, [], LAYERS, tmp_path / "none")
    with pytest.raises(ValueError, match="tokens_per_image: expected at most 24, the patches per image, got 25"):
        cache_tokens(model, parts(images), LAYERS, tmp_path / "many", tokens_per_image=25)
    with pytest.raises(ValueError, match=r"dtype: expected one that holds the tokens, .*float16"):
        cache_tokens(model, [(images * 1e30, None)], LAYERS, tmp_path / "large", dtype=torch.float16)


def test_tokens_that_are_too_small_for_the_disk(model, images, tmp_path):
    """float16 rounds 1e-7 by several percent, and 1e-8 to 0."""
    plain = model.blocks[2].forward
    for size in (1e-7, 1e-8):
        model.blocks[2].forward = lambda x, size=size, **options: plain(x, **options) * size
        with pytest.raises(ValueError, match=r"dtype: expected one that holds the tokens, .* got torch.float16"):
            cache_tokens(model, parts(images), [2], tmp_path / "half", dtype=torch.float16)
        cache_tokens(model, parts(images), [2], tmp_path / f"{size}", dtype=torch.bfloat16)
    model.blocks[2].forward = lambda x, **options: plain(x, **options) * 0
    cache_tokens(model, parts(images), [2], tmp_path / "zeros", dtype=torch.float16)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_on_disk(model, images, tmp_path, dtype):
    cache = cache_tokens(model, parts(images), LAYERS, tmp_path, dtype=dtype)
    expected = fastfg.residuals(model, images, [2])[2].flatten(0, 1).to(dtype).float()
    torch.testing.assert_close(cache.tokens(2), expected, rtol=0.01, atol=0.01)
    assert cache.tokens(2).dtype == torch.float32


@pytest.fixture
def numbered(tmp_path):
    """A cache of 40 images with 5 tokens of width 1: the numbers 0 to 199."""
    made = {"tokens_per_image": 5, "dtype": "torch.float32", "seed": 0, "weights": {"0": "abc"}}
    (tmp_path / "tokens.json").write_text(json.dumps({"format": "fastfg tokens 1", "width": 1, "layers": [0]} | made))
    from safetensors.torch import save_file

    with (tmp_path / "shards.jsonl").open("w") as file:
        for s in range(8):
            keys = [f"{s}.{i}" for i in range(5)]
            save_file({"layer_0": torch.arange(25.0).reshape(5, 5, 1) + 25 * s}, tmp_path / f"{s}.safetensors")
            file.write(json.dumps({"name": f"{s}.safetensors", "keys": keys, "tokens_per_image": 5}) + "\n")
    return TokenCache(tmp_path)


@pytest.mark.parametrize("buffer", [16, 60, 1000])
def test_every_token_comes_once_per_pass(numbered, buffer):
    found = list(numbered.batches(0, 8, buffer=buffer))
    assert [len(batch) for batch in found] == [8] * 25
    assert torch.cat(found).flatten().sort().values.tolist() == list(range(200))
    again = list(numbered.batches(0, 8, buffer=buffer))
    assert all(map(torch.equal, found, again))
    other = torch.cat(list(numbered.batches(0, 8, buffer=buffer, epoch=1)))
    assert not torch.equal(torch.cat(found), other)
    some = torch.cat(list(numbered.batches(0, 4, buffer=buffer, keys=["0.0", "7.4"]))).flatten()
    assert set(some.tolist()) < {*range(5), *range(195, 200)}
    assert len(some) == 8
    with pytest.raises(ValueError, match="buffer: expected at least two batches of 9 tokens, got 16"):
        next(numbered.batches(0, 9, buffer=16))


def test_shards_of_other_images_change_no_order(numbered):
    keys = [key for key in numbered.keys if key[0] in "25"]
    before, layout = list(numbered.batches(0, 4, keys=keys)), numbered.layout(keys)
    numbered.shards = [shard for shard in numbered.shards if shard.name[0] in "257"]
    assert all(map(torch.equal, before, numbered.batches(0, 4, keys=keys)))
    assert numbered.layout(keys) == layout != numbered.layout(keys[:-1])


def test_batches_mix_the_shards(numbered):
    first = next(numbered.batches(0, 20, buffer=1000)).flatten()
    assert len({int(n) // 25 for n in first}) > 4


def test_a_split_keeps_groups_together(numbered):
    train, report = numbered.split(0.2)
    assert (len(train), len(report)) == (32, 8)
    assert sorted(train + report) == sorted(numbered.keys)
    groups = {key: key[0] for key in numbered.keys}
    train, report = numbered.split(0.25, groups=groups, seed=5)
    assert len({key[0] for key in report}) == 2
    assert not {key[0] for key in report} & {key[0] for key in train}
    with pytest.raises(ValueError, match=r"groups: expected one per image, got none for \['0.0'"):
        numbered.split(groups={})
    with pytest.raises(ValueError, match="held_out: expected a share that leaves some of 8 on both sides, got 0.01"):
        numbered.split(0.01, groups=groups)


def test_damaged_folders_are_named(model, images, tmp_path):
    cache = cache_tokens(model, parts(images), LAYERS, tmp_path)
    index, whole = tmp_path / "shards.jsonl", (tmp_path / "shards.jsonl").read_text()
    for text, said in (
        (whole + whole.splitlines()[0].replace("}", ', "more": 1}') + "\n", "expected each image and each shard once"),
        ("{}\n", "expected one shard per line"),
        (
            whole.replace('"tokens_per_image": 24', '"tokens_per_image": "24"'),
            "expected a name, keys and tokens_per_image per line",
        ),
        (whole.replace('"name": "', '"name": 5, "was": "'), "expected a name, keys and tokens_per_image per line"),
        ("no\n", "expected one shard per line"),
    ):
        index.write_text(text)
        with pytest.raises(ValueError, match=f"^folder: {said} .*shards.jsonl"):
            TokenCache(tmp_path)
    index.write_text(whole.replace('"tokens_per_image": 24', '"tokens_per_image": 23'))
    with pytest.raises(ValueError, match=r"^folder: expected tokens \[.*, 23, 32\] in .*, as shards.jsonl says, got"):
        TokenCache(tmp_path).tokens(1)
    index.write_text(whole)
    shard = tmp_path / cache.shards[0].name
    good = shard.read_bytes()
    shard.write_bytes(good[:-8] + b"\xff" * 8)
    with pytest.raises(ValueError, match="^folder: expected finite tokens in .*safetensors, got NaN or infinity"):
        [TokenCache(tmp_path).tokens(layer) for layer in LAYERS]
    shard.unlink()
    with pytest.raises(ValueError, match=f"^folder: expected {shard.name} in .*, as shards.jsonl says, got no such"):
        TokenCache(tmp_path)
    shard.write_bytes(good)
    shard.write_bytes(shard.read_bytes()[:100])
    with pytest.raises(ValueError, match="^folder: expected tokens in .*safetensors, got a file that can't be read"):
        TokenCache(tmp_path).tokens(1)


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("layers", 7, "expected a list of blocks as layers in .*, got 7"),
        ("layers", None, "expected layers in it"),
        ("width", "x", "expected a width of at least 1 in .*, got 'x'"),
        ("weights", {"1": "a"}, r"expected weights for blocks \[1, 2\] in"),
    ],
)
def test_wrong_fields_are_named(model, images, tmp_path, field, value, said):
    cache_tokens(model, parts(images), LAYERS, tmp_path)
    file = tmp_path / "tokens.json"
    found = json.loads(file.read_text()) | {field: value}
    file.write_text(json.dumps({name: one for name, one in found.items() if one is not None or name != field}))
    with pytest.raises(ValueError, match=said):
        TokenCache(tmp_path)


def test_a_run_that_was_stopped_at_its_start_goes_on(model, images, tmp_path):
    for name in ("tokens.json", "shards.jsonl", "tokens_00000.safetensors"):
        temporary(tmp_path / name).write_text("{")
        assert len(cache_tokens(model, parts(images), LAYERS, tmp_path).keys) == 9
        assert not list(tmp_path.glob(".*.tmp"))  # a writer that was killed leaves nothing for ever


def test_one_process_writes_at_a_time(model, images, tmp_path):
    holder = "import sys, time; from pathlib import Path; from fastfg.study.claims import alone\n"
    holder += "with alone(Path(sys.argv[1]), 'folder'): print('held', flush=True); time.sleep(600)"
    with subprocess.Popen([sys.executable, "-c", holder, str(tmp_path)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        with pytest.raises(
            ValueError, match="^folder: expected a folder that no other process writes to, got .* one d"
        ):
            cache_tokens(model, [(images, None)], [1], tmp_path)
        process.kill()
    assert cache_tokens(model, [(images, None)], [1], tmp_path).n_tokens > 0


WITHOUT_LOCKS = """
import errno, fcntl, sys, time
from pathlib import Path
import torch
from fastfg.models.timm import import_timm
from fastfg.study import cache_tokens, token_writer

import_timm()
from tests.tools import tiny_vit

def refuse(*_):
    raise OSError(errno.ENOLCK, "No locks available")

fcntl.lockf, token_writer.SHARD_BYTES = refuse, 1
folder, mine, other = map(Path, sys.argv[1:])
images = torch.randn(4, 3, 32, 48, generator=torch.Generator().manual_seed(3))

def batches():  # the second shard is computed by both processes before one of them writes it
    yield images[:2], ["a", "b"]
    mine.touch()
    while not other.exists():
        time.sleep(0.01)
    yield images[2:], ["c", "d"]

said = []
cache = cache_tokens(tiny_vit(torch.float32), batches(), [1], folder, say=said.append)
assert cache.keys == list("abcd"), cache.keys
print(*said)
"""


def test_two_processes_without_locks(tmp_path):
    one, other = tmp_path / "one", tmp_path / "other"
    command = [sys.executable, "-c", WITHOUT_LOCKS, str(tmp_path / "tokens")]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    started = [subprocess.Popen([*command, *map(str, names)], **options) for names in ((one, other), (other, one))]
    for process in started:
        said, error = process.communicate(timeout=120)
        assert process.returncode == 0, error
        assert "this file system has no locks (No locks available)" in said
        assert "Warning" not in error
    lines = (tmp_path / "tokens/shards.jsonl").read_text().splitlines()
    assert lines.count(lines[-1]) == 2
    cache = TokenCache(tmp_path / "tokens")
    assert cache.keys == list("abcd")
    assert cache.tokens(1).shape == (4 * 24, 32)
    assert not list((tmp_path / "tokens").glob(".*.tmp"))
