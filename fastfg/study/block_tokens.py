"""The tokens of a study's blocks on disk: a block that is added later is written alone, beside those that are there."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from fastfg.files import write_durably
from fastfg.models import Adapter
from fastfg.study import token_writer
from fastfg.study.prepared import Once, Thing
from fastfg.study.token_cache import TokenCache

COMPLETE = "complete"


def complete_blocks(folder: Path) -> dict[int, TokenCache]:
    """{block: the cache that holds it}, of the caches in ``folder`` that are complete."""
    parts = sorted(file.parent for file in folder.glob(f"*/{COMPLETE}"))
    return {block: cache for cache in map(TokenCache, parts) for block in cache.layers}


def cache_blocks(
    model: Adapter,
    images: Callable[[], Iterable[tuple[Tensor, Sequence[str]]]],
    wanted: Sequence[int],
    layers: Sequence[int],
    folder: Path,
    once: Once,
    *,
    track: Callable[[], Callable[[int], None]] | None = None,
    **options: Any,
) -> dict[int, TokenCache]:
    """The tokens of the blocks ``wanted``, from one pass over the images for those that ``folder`` does not hold.

    Args:
        images: gives (images, keys) in batches; called only if a block is missing.
        layers: all blocks of the study, those wanted among them. A shard holds as many images as if all were written
            together: what is trained from a block's tokens does not depend on when the block was added.
        once: lets one process write, while the others wait.
        track: called when this process begins to write; returns what is called with the number of images done.
        options: of :func:`fastfg.study.cache_tokens`.
    """

    def missing() -> list[int]:
        held = complete_blocks(folder)
        return [block for block in wanted if block not in held]

    def write() -> None:
        new = missing()
        part = folder / "-".join(map(str, new))
        shard_bytes = -(-token_writer.SHARD_BYTES * len(new) // len(layers))
        progress = None if track is None else track()
        more: dict[str, Any] = {"shard_bytes": shard_bytes, "progress": progress, **options}
        token_writer.cache_tokens(model, images(), new, part, **more)
        write_durably(part / COMPLETE, b"")

    once(Thing("tokens", lambda: not missing(), write))
    held = complete_blocks(folder)
    return {block: held[block] for block in wanted}
