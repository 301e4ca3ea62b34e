"""Files that are known by sight and not read, each with its reason."""

from __future__ import annotations

from fastfg.sae.files.allowed import Record
from fastfg.sae.formats.common import Contents, Given
from fastfg.sae.model import SparseAutoencoder

NAME = "known by sight"
FILES = ""
REASONS = {
    "mean_center": "an MSAE of pooled embeddings, which has no tokens",
    "encoder_linear.weight": "Goodfire's layout, for language models",
    "autoencoder": "a Prisma file of the SAELens 2 era, whose site is hook_mlp_out",
}


def matches(contents: Contents) -> bool:
    return _reason(contents) is not None


def block(contents: Contents) -> int | None:
    return None


def read(contents: Contents, given: Given) -> SparseAutoencoder:
    raise ValueError(f"path: expected an SAE of a block's output in {contents.file}, got {_reason(contents)}")


def _reason(contents: Contents) -> str | None:
    if isinstance(contents.weights.content, Record):
        return f"a whole pickled module ({contents.weights.content.name}): save its state_dict() instead"
    return next((reason for key, reason in REASONS.items() if key in contents.keys), None)
