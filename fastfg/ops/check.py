"""One way to say that a tensor has the wrong shape."""

from __future__ import annotations

from torch import Tensor


def check_shapes(sizes: dict[str, int], **arguments: tuple[Tensor | None, str]) -> None:
    """Each argument is (tensor, its letters): ``g=(g, "T d")`` must agree with the sizes known so far.

    A letter that is new takes its size from the tensor. Raises ValueError that names the argument.
    """
    for name, (tensor, letters) in arguments.items():
        if tensor is None:
            continue
        dims = letters.split()
        expected = [str(sizes.get(letter, letter)) for letter in dims]
        fits = tensor.ndim == len(dims) and all(
            sizes.setdefault(letter, size) == size for letter, size in zip(dims, tensor.shape, strict=True)
        )
        if not fits:
            raise ValueError(f"{name}: expected [{', '.join(expected)}] ({letters}), got {list(tensor.shape)}")
