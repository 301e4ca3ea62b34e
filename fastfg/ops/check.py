"""One way to say that an argument doesn't fit."""

from __future__ import annotations

from torch import Tensor

from fastfg.reference.relevancy import IDENTITIES


def check_shapes(sizes: dict[str, int], **arguments: tuple[Tensor | None, str]) -> None:
    """Each argument is (tensor, its letters): ``g=(g, "T d")`` must agree with the sizes known so far.

    A letter that is new takes its size from the tensor. Raises ValueError that names the argument.
    """
    for name, (tensor, letters) in arguments.items():
        if tensor is None:
            continue
        dims = letters.split()
        known = [sizes.get(letter) for letter in dims]
        fits = tensor.ndim == len(dims) and all(
            sizes.setdefault(letter, size) == size for letter, size in zip(dims, tensor.shape, strict=True)
        )
        if not fits:
            expected = ", ".join(
                letter if size is None else str(size) for letter, size in zip(dims, known, strict=True)
            )
            raise ValueError(f"{name}: expected [{expected}] ({letters}), got {list(tensor.shape)}")


def check_identity(identity: str) -> None:
    if identity not in IDENTITIES:
        raise ValueError(f"identity: expected one of {IDENTITIES}, got {identity!r}")
