"""Residual tokens on disk, as :func:`fastfg.study.cache_tokens` writes them: several layers from one pass over images.

A cache is a folder: ``tokens.json`` says how the tokens were made, and each line of ``shards.jsonl`` names a complete
shard, its images, and the tokens per image. A shard is a safetensors file with ``layer_<l>`` [B, n, d] per layer.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastfg.files import read_json
from fastfg.perturb.seeds import generator

FORMAT = "fastfg tokens 1"
RECIPE, SHARDS = "tokens.json", "shards.jsonl"


@dataclass(frozen=True)
class Shard:
    """One file of a cache: its images, and how many tokens of each it holds."""

    name: str
    keys: tuple[str, ...]
    tokens_per_image: int


class TokenCache:
    """The tokens in ``folder``.

    Attributes:
        recipe: how they were made. layers: the blocks. width: d. shards: in the order in which they were written.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.recipe = _recipe(self.folder / RECIPE)
        self.layers, self.width = tuple(self.recipe["layers"]), int(self.recipe["width"])
        self.shards = _shards(self.folder / SHARDS)

    @property
    def keys(self) -> list[str]:
        """The keys of all images."""
        return [key for shard in self.shards for key in shard.keys]

    @property
    def n_tokens(self) -> int:
        """The number of tokens per layer."""
        return sum(len(shard.keys) * shard.tokens_per_image for shard in self.shards)

    def read(
        self, layer: int, shard: Shard, keys: Collection[str] | None = None, device: str | torch.device = "cpu"
    ) -> Tensor:
        """The tokens [n, d] of one shard in float32: of all its images, or of those among ``keys``."""
        from safetensors import SafetensorError, safe_open

        if layer not in self.layers:
            raise ValueError(f"layer: expected one of {self.layers}, which {self.folder} holds, got {layer}")
        file = self.folder / shard.name
        try:
            with safe_open(file, framework="pt") as stored:
                tokens = stored.get_tensor(f"layer_{layer}")
        except (OSError, SafetensorError) as error:
            raise ValueError(f"folder: expected tokens in {file}, got a file that can't be read: {error}") from None
        expected = [len(shard.keys), shard.tokens_per_image, self.width]
        if list(tokens.shape) != expected:
            raise ValueError(
                f"folder: expected tokens {expected} in {file}, as {SHARDS} says, got {list(tokens.shape)}"
            )
        if not bool(tokens.isfinite().all()):
            raise ValueError(f"folder: expected finite tokens in {file}, got NaN or infinity: a damaged file")
        if keys is not None:
            tokens = tokens[[i for i, key in enumerate(shard.keys) if key in keys]]
        return tokens.to(device).flatten(0, 1).float()

    def tokens(self, layer: int, keys: Collection[str] | None = None) -> Tensor:
        """All tokens [T, d] of one layer in memory, in float32: of all images, or of those among ``keys``."""
        wanted = None if keys is None else set(keys)
        return torch.cat([self.read(layer, shard, wanted) for shard in self.shards])

    def batches(
        self,
        layer: int,
        batch_size: int,
        *,
        epoch: int = 0,
        seed: int = 0,
        buffer: int = 2**18,
        keys: Collection[str] | None = None,
        device: str | torch.device = "cpu",
    ) -> Iterator[Tensor]:
        """Full batches [batch_size, d] of one pass over the tokens, shuffled through a buffer of bounded size.

        Shards with tokens of ``keys`` come in random order. When the buffer holds ``buffer`` tokens or more, it is
        shuffled and all but half of ``buffer`` is given out. The order depends on ``seed`` and ``epoch`` alone, so a
        pass can be repeated. Tokens at the end that do not fill a batch are left out.

        Args:
            buffer: tokens in memory beside those of one shard. keys: the images; None: all of them.
            device: of the buffer and the batches.
        """
        if batch_size < 1 or buffer < 2 * batch_size:
            raise ValueError(f"buffer: expected at least two batches of {batch_size} tokens, got {buffer}")
        wanted = None if keys is None else set(keys)
        random = generator(seed, f"epoch {epoch}", "tokens")
        held = torch.empty(0, self.width, dtype=torch.float32, device=device)
        shards = self._shards_with(wanted)
        order = torch.randperm(len(shards), generator=random).tolist()
        for number, shard in enumerate(order, 1):
            held = torch.cat([held, self.read(layer, shards[shard], wanted, device)])
            last = number == len(order)
            if last or len(held) >= buffer:
                held = held[torch.randperm(len(held), generator=random).to(device)]
                n = (len(held) - (0 if last else buffer // 2)) // batch_size * batch_size
                yield from held[:n].split(batch_size) if n else ()
                held = held[n:].clone()  # a view would keep the whole buffer in memory

    def _shards_with(self, keys: set[str] | None) -> list[Shard]:
        return [shard for shard in self.shards if keys is None or not keys.isdisjoint(shard.keys)]

    def layout(self, keys: Collection[str]) -> str:
        """A hash of how the tokens of these images are spread over shards, which the order of batches depends on."""
        wanted = set(keys)
        text = json.dumps(
            [[s.name, s.tokens_per_image, [k in wanted for k in s.keys]] for s in self._shards_with(wanted)]
        )
        return hashlib.sha256(text.encode()).hexdigest()

    def count(self, keys: Collection[str]) -> int:
        """The number of tokens per layer of the images among ``keys``."""
        wanted = set(keys)
        return sum(len(wanted.intersection(shard.keys)) * shard.tokens_per_image for shard in self.shards)

    def split(
        self,
        held_out: float = 0.1,
        *,
        groups: Mapping[str, Any] | None = None,
        seed: int = 0,
        keys: Collection[str] | None = None,
    ) -> tuple[list[str], list[str]]:
        """The keys of the images to train on, and those of the images to report on.

        Args:
            held_out: share of the images, or of the groups, to report on. groups: {key: group}, such as the patient of
                each image; a group is never on both sides.
            keys: the images to split; None: all of them.
        """
        if not 0 < held_out < 1:
            raise ValueError(f"held_out: expected a share between 0 and 1, got {held_out!r}")
        wanted = set(self.keys if keys is None else keys)
        own = [key for key in self.keys if key in wanted]
        missing = [key for key in own if groups is not None and key not in groups]
        if missing:
            raise ValueError(f"groups: expected one per image, got none for {missing[:3]}")
        group_of = {key: key if groups is None else groups[key] for key in own}
        names = list(dict.fromkeys(group_of.values()))
        n = round(held_out * len(names))
        if not on_both_sides(held_out, len(names)):
            raise ValueError(
                f"held_out: expected a share that leaves some of {len(names)} on both sides, got {held_out}"
            )
        order = torch.randperm(len(names), generator=generator(seed, "split", "tokens")).tolist()
        reported = {names[i] for i in order[:n]}
        sides: tuple[list[str], list[str]] = ([], [])
        for key, group in group_of.items():
            sides[group in reported].append(key)
        return sides


def on_both_sides(held_out: float, n: int) -> bool:
    """Whether this share of ``n`` images or groups, rounded, leaves some to train on and some to report on.

    >>> on_both_sides(0.1, 5), on_both_sides(0.1, 6)
    (False, True)
    """
    return 0 < round(held_out * n) < n


def _recipe(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise FileNotFoundError(f"folder: expected a folder with {RECIPE}, got {file.parent}")
    found = read_json(file)
    if found.get("format") != FORMAT:
        raise ValueError(f"folder: expected {FORMAT!r} in {file}, got {found!r:.80}")
    found = read_json(file, "layers", "width", "tokens_per_image", "dtype", "seed", "weights")
    layers, width, weights = found["layers"], found["width"], found["weights"]
    if not isinstance(layers, list) or not layers or not all(type(layer) is int for layer in layers):
        raise ValueError(f"folder: expected a list of blocks as layers in {file}, got {layers!r:.80}")
    if type(width) is not int or width < 1:
        raise ValueError(f"folder: expected a width of at least 1 in {file}, got {width!r:.80}")
    if not isinstance(weights, dict) or any(str(layer) not in weights for layer in layers):
        raise ValueError(f"folder: expected weights for blocks {layers} in {file}, got {weights!r:.80}")
    return found


def _shards(file: Path) -> list[Shard]:
    """The shards that are named. A line that was being written when a run was stopped names none."""
    lines = file.read_text(encoding="utf-8").split("\n")[:-1] if file.exists() else []
    try:
        found = [json.loads(line) for line in dict.fromkeys(lines)]  # without locks, two processes write the same one
        shards = [Shard(one["name"], tuple(one["keys"]), one["tokens_per_image"]) for one in found]
        wrong = [one for one in shards if not _is_sound(one)]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"folder: expected one shard per line of {file}, got {error!r}") from None
    if wrong:
        raise ValueError(
            f"folder: expected a name, keys and tokens_per_image per line of {file}, got {wrong[0]!r:.120}"
        )
    keys = [key for shard in shards for key in shard.keys]
    if len(set(keys)) != len(keys) or len({shard.name for shard in shards}) != len(shards):
        raise ValueError(
            f"folder: expected each image and each shard once in {file}, got some twice (two runs at once?)"
        )
    for shard in shards:
        if Path(shard.name).name != shard.name:
            raise ValueError(f"folder: expected the name of a file in {file}, got {shard.name!r}")
        if not (file.parent / shard.name).is_file():
            raise ValueError(f"folder: expected {shard.name} in {file.parent}, as {SHARDS} says, got no such file")
    return shards


def _is_sound(shard: Shard) -> bool:
    keys = all(isinstance(key, str) for key in shard.keys)
    return isinstance(shard.name, str) and keys and type(shard.tokens_per_image) is int and shard.tokens_per_image > 0
