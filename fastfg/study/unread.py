"""The training images that could not be read, from what was made of the others."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastfg.study.block_tokens import complete_blocks
from fastfg.study.config import Config
from fastfg.study.head import without_features
from fastfg.study.prepared import BATCH, read_rows
from fastfg.study.shards import Failure

if TYPE_CHECKING:
    import pandas as pd

READABLE_NOW = "could not be read when the model or the SAEs were trained; it can be read now"


def unread_images(config: Config, train: pd.DataFrame, drawn: pd.DataFrame, transform: Any) -> list[Failure]:
    """The training images that the head's features or the SAEs' tokens lack, with the reason.

    It does not matter which process tried to read them, or when: these images are tried again for the reason.

    Args:
        train: the rows of the manifest that the head is fitted on. drawn: those of them that the SAEs are trained on.
    """
    lost = set(without_features(config, train)) if config.model.probe else set()
    if config.saes.train is not None:
        for cache in complete_blocks(config.run.out / "tokens").values():
            lost |= set(drawn["key"]).difference(cache.keys)
    images = train[train["key"].isin(lost)]
    reasons = {str(e.path): e.message for batch, _ in read_rows(images, transform, BATCH) for e in batch.errors}
    rows = zip(images["key"], images["path"], strict=True)
    return [Failure(key, path, reasons.get(path, READABLE_NOW)) for key, path in rows]
