"""Write the residual tokens of many images to disk, to train SAEs of several layers from one pass over the images."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from fastfg.attribution.residuals import residuals
from fastfg.checks import check_layers
from fastfg.files import naming, write_durably, write_tensors
from fastfg.models import Adapter, adapt
from fastfg.models.fingerprint import fingerprints
from fastfg.perturb.seeds import generator, image_keys
from fastfg.study.claims import LOCK, alone
from fastfg.study.telling import Say
from fastfg.study.token_cache import FORMAT, RECIPE, SHARDS, TokenCache
from fastfg.types import integers

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SHARD_BYTES = 2**26
ROUNDING = 1e-2  # share of the tokens' norm that the dtype of the disk may lose: that of bfloat16 is 0.2%


def cache_tokens(
    model: nn.Module | Adapter,
    batches: Iterable[tuple[Tensor, Sequence[str] | None]],
    layers: int | Iterable[int],
    folder: str | Path,
    *,
    tokens_per_image: int | None = None,
    dtype: torch.dtype = torch.float32,
    max_bytes: int | None = None,
    shard_bytes: int | None = None,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
    say: Say | None = None,
) -> TokenCache:
    """Write the residual stream after ``layers`` at the patches of many images to ``folder``.

    All layers come from one forward pass per image. A shard is written under another name and renamed when it is
    complete. So a run that was stopped goes on with the images that are missing: images that the folder already holds
    are not computed again.

    Args:
        batches: (images [B, C, H, W], their keys or None); without keys, a hash of the pixels is the key.
        layers: 0-based blocks.
        tokens_per_image: patches per image, drawn by ``seed`` and the image's key, in the order of the grid; None: all.
        dtype: of the tokens on disk: float32, float16 or bfloat16.
        max_bytes: the most that the tokens may take on disk; None: no limit.
        shard_bytes: a shard is written when its tokens take as much; None: 64 MiB.
        progress: called with the number of images that are done.
        say: called with a line if the file system has no locks; None: :func:`warnings.warn`.

    Raises ValueError or TypeError that names the argument: for a folder with tokens of another model, other layers or
    another seed; where ``dtype`` can't hold a value; and for the first image that has no room in ``max_bytes``. What
    was written stays.

    >>> import tempfile, timm, torch, fastfg
    >>> model = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=5).eval()
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     cache = fastfg.study.cache_tokens(model, [(torch.randn(6, 3, 32, 32), None)], [1, 2], folder)
    ...     cache.n_tokens, cache.tokens(layer=2).shape
    (24, torch.Size([24, 192]))
    """
    layers = integers("layers", layers)
    if tokens_per_image is not None and (isinstance(tokens_per_image, bool) or not tokens_per_image >= 1):
        raise ValueError(f"tokens_per_image: expected at least 1, got {tokens_per_image!r}")
    if shard_bytes is not None and shard_bytes < 1:
        raise ValueError(f"shard_bytes: expected at least 1, got {shard_bytes!r}")
    if dtype not in DTYPES:
        raise ValueError(f"dtype: expected one of {DTYPES}, got {dtype!r}")
    adapter = adapt(model)
    check_layers("layers", layers, len(adapter.blocks))
    recipe = {"layers": list(layers), "tokens_per_image": tokens_per_image, "seed": seed, "dtype": str(dtype)}
    weights = {str(block): found for block, found in fingerprints(adapter, layers).items()}
    _check_new(Path(folder))
    with alone(Path(folder), "folder", say):
        writer = _Writer(Path(folder), recipe | {"weights": weights}, max_bytes, shard_bytes or SHARD_BYTES)
        _write(writer, model, batches, layers, tokens_per_image, dtype, seed, progress)
    return TokenCache(folder)


def shape_of_tokens(model: Adapter, transform: Callable[[Any], Tensor], layers: Sequence[int]) -> tuple[int, int]:
    """The patches of an image, and the width of the residual stream, by one blank image."""
    image = transform(Image.new("RGB", (256, 256)))[None].to(model.parameter.device)
    _, patches, width = residuals(model, image, layers)[layers[0]].shape
    return patches, width


def check_tokens(
    shape: tuple[int, int],
    n_images: int,
    tokens_per_image: int | None,
    batch_tokens: int,
    named: Callable[[str], str] = str,
) -> int:
    """How many tokens of ``n_images`` images there are to train on, at most: images may turn out to be unreadable.

    Args:
        shape: of :func:`shape_of_tokens`. tokens_per_image: None: all patches.
        named: what the messages call an argument.

    Raises ValueError if an image has fewer patches than ``tokens_per_image``, or if the tokens fill no batch.
    """
    patches, _ = shape
    if tokens_per_image is not None and tokens_per_image > patches:
        name = named("tokens_per_image")
        raise ValueError(f"{name}: expected at most {patches}, the patches per image, got {tokens_per_image}")
    n = n_images * (tokens_per_image or patches)
    check_batch(n, batch_tokens, named)
    return n


def check_batch(n: int, batch_tokens: int, named: Callable[[str], str] = str) -> None:
    """Raise ValueError if ``n`` tokens fill no batch."""
    if n < batch_tokens:
        name = named("batch_tokens")
        raise ValueError(f"{name}: expected at most {n}, the tokens to train on, got {batch_tokens}")


def _write(
    writer: _Writer,
    model: nn.Module | Adapter,
    batches: Iterable[tuple[Tensor, Sequence[str] | None]],
    layers: Sequence[int],
    tokens_per_image: int | None,
    dtype: torch.dtype,
    seed: int,
    progress: Callable[[int], None] | None,
) -> None:
    """Write the tokens of the images that are new."""
    try:
        for images, keys in batches:
            names = image_keys(images, keys)
            new = [i for i, name in enumerate(names) if name not in writer.known and names.index(name) == i]
            if new:
                own = [names[i] for i in new]
                found = residuals(model, images[new], layers)
                chosen = {block: _cast(_chosen(x, own, tokens_per_image, seed), dtype) for block, x in found.items()}
                writer.add(chosen, own)
            if progress is not None:
                progress(len(writer.known))
    except Exception:
        writer.flush()  # what a bad image or a full disk leaves is kept
        raise
    writer.flush()
    if not writer.known:
        raise ValueError("batches: expected at least one image, got none")


def _chosen(x: Tensor, keys: Sequence[str], n: int | None, seed: int) -> Tensor:
    """``n`` of the tokens of each image: [B, P, d] -> [B, n, d]."""
    if n is None:
        return x
    if n > x.shape[1]:
        raise ValueError(f"tokens_per_image: expected at most {x.shape[1]}, the patches per image, got {n}")
    kept = [torch.randperm(x.shape[1], generator=generator(seed, key, "tokens"))[:n].sort().values for key in keys]
    return torch.stack([image[rows.to(x.device)] for image, rows in zip(x, kept, strict=True)])


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``x`` on the CPU in the dtype of the disk. Raises ValueError for values too large or too small for it."""
    cast = x.to(dtype)
    lost = (cast.double() - x.double()).norm() / x.double().norm()  # NaN if all are zero
    if not bool(cast.isfinite().all()) or bool(lost > ROUNDING):
        largest = float(x.abs().max())
        raise ValueError(f"dtype: expected one that holds the tokens, whose largest value is {largest:g}, got {dtype}")
    return cast.cpu()


class _Writer:
    """Collects the tokens of images, and writes a shard when they are ``shard_bytes`` or more."""

    def __init__(self, folder: Path, recipe: dict[str, Any], max_bytes: int | None, shard_bytes: int) -> None:
        self.folder, self.recipe, self.max_bytes, self.shard_bytes = folder, recipe, max_bytes, shard_bytes
        self.width: int | None = None
        self.known: set[str] = set()
        self.bytes = self.written = self.pending_bytes = 0
        self.pending: list[tuple[dict[int, Tensor], list[str]]] = []
        if (folder / RECIPE).exists():
            self._go_on(TokenCache(folder))

    def _go_on(self, earlier: TokenCache) -> None:
        before = {name: earlier.recipe.get(name) for name in self.recipe}
        other = [name for name, value in self.recipe.items() if before[name] != value]
        if other == ["weights"]:
            raise ValueError(
                f"folder: expected tokens of this model's weights, got those of others in {earlier.folder}"
            )
        if other:
            got = ", ".join(f"{name}={before[name]!r}" for name in other)
            wanted = ", ".join(f"{name}={self.recipe[name]!r}" for name in other)
            raise ValueError(f"folder: expected tokens made with {wanted}, got {got} in {earlier.folder}")
        self.width, self.written, self.known = earlier.width, len(earlier.shards), set(earlier.keys)
        self.bytes = sum((self.folder / shard.name).stat().st_size for shard in earlier.shards)
        index = self.folder / SHARDS
        text = index.read_text(encoding="utf-8") if index.exists() else ""
        if not text.endswith("\n"):  # a run was stopped in the middle of a line
            write_durably(index, text[: text.rfind("\n") + 1].encode())

    def add(self, tokens: dict[int, Tensor], keys: list[str]) -> None:
        """Add the tokens [B, n, d] per layer of images that are new. ValueError for those that have no room."""
        first = next(iter(tokens.values()))
        size = sum(x.numel() * x.element_size() for x in tokens.values())
        one = size // len(keys)
        room = len(keys) if self.max_bytes is None else (self.max_bytes - self.bytes - self.pending_bytes) // one
        if room < len(keys):
            if room > 0:
                self.add({block: x[:room] for block, x in tokens.items()}, keys[:room])
            raise ValueError(
                f"max_bytes: expected room for more than {len(self.known)} images, got {self.max_bytes} bytes; one "
                f"image takes {one}"
            )
        if self.pending and next(iter(self.pending[0][0].values())).shape[1] != first.shape[1]:
            self.flush()  # images of another size
        if self.width is None:
            self.width = first.shape[2]
            recipe = {"format": FORMAT, "width": self.width, **self.recipe}
            write_durably(self.folder / RECIPE, json.dumps(recipe, indent=2).encode())
        self.pending.append((tokens, keys))
        self.pending_bytes += size
        self.known.update(keys)
        if self.pending_bytes >= self.shard_bytes:
            self.flush()

    def flush(self) -> None:
        """Write a shard with all that was added since the last one."""
        if not self.pending:
            return
        parts, keys = [tokens for tokens, _ in self.pending], [key for _, own in self.pending for key in own]
        joined = {f"layer_{block}": torch.cat([part[block] for part in parts]).contiguous() for block in parts[0]}
        name = f"tokens_{self.written:05d}.safetensors"
        write_tensors(self.folder / name, joined)
        line = {"name": name, "keys": keys, "tokens_per_image": next(iter(joined.values())).shape[1]}
        with naming(self.folder / SHARDS), (self.folder / SHARDS).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.bytes += self.pending_bytes
        self.written += 1
        self.pending, self.pending_bytes = [], 0


def _check_new(folder: Path) -> None:
    """Raise ValueError if ``folder`` is something else than tokens."""
    if folder.exists() and not (folder / RECIPE).exists() and (not folder.is_dir() or _foreign(folder)):
        raise ValueError(f"folder: expected a new or empty folder, or one with tokens, got {folder}")


def _foreign(folder: Path) -> list[str]:
    """Names in ``folder`` that a run that was stopped at its start has not left."""
    return [one.name for one in folder.iterdir() if one.name != LOCK and not one.name.startswith(f".{RECIPE}.")]
