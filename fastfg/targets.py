"""Targets: which value of the model's output is explained and read, per image."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

TargetFunction = Callable[[Any], Tensor]  # the model's output -> one value per image [B], differentiable
Select = Callable[[Any], Tensor]  # the model's output -> its logits or its embedding [B, n]
LINKS = ("softmax", "sigmoid")

log = logging.getLogger("fastfg")
_logged_one_logit = False


class Target:
    """The logit of a class, the difference of two logits, or (:meth:`similarity`) the similarity to an embedding.

    ``attribute`` differentiates the logit or the similarity. ``evaluate`` reads it too, and reads the probability
    where there is one.

    Args:
        classes: the class, or one per image [B]; None is the predicted class, the largest logit.
        minus: a second class, or one per image. The difference of the two logits is explained.
        link: what the probability of a class is. ``softmax`` is over all classes, and needs at least two logits.
            ``sigmoid`` is of the class's own logit, for multi-label heads. None: there is no probability, the logit
            itself is read. ``auto`` is ``softmax``, except that a single logit ``z`` is read as a sigmoid: class 1
            has the logit ``z``, class 0 has ``-z``. With ``minus``, ``auto`` is None, and ``softmax`` is over the
            two classes alone.
        output: where the logits [B, n] are in the model's output, as a function. None: the output itself, its field
            or key ``logits``, or what the model's adapter says.

    Raises ValueError or TypeError that names the argument.

    >>> import torch, timm, fastfg
    >>> model = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=5).eval()
    >>> fastfg.attribute(model, torch.randn(2, 3, 32, 32), target=fastfg.Target(3, minus=1)).maps.shape
    torch.Size([2, 2, 2])
    """

    def __init__(
        self,
        classes: int | Sequence[int] | Tensor | None = None,
        *,
        minus: int | Sequence[int] | Tensor | None = None,
        link: str | None = "auto",
        output: Select | None = None,
    ) -> None:
        if link not in (None, "auto", *LINKS):
            raise ValueError(f"link: expected 'auto', 'softmax', 'sigmoid' or None, got {link!r}")
        if minus is not None and link == "sigmoid":
            raise ValueError("link: expected 'auto', 'softmax' or None for a difference of two classes, got 'sigmoid'")
        if minus is not None and classes is None:
            raise ValueError("minus: expected None without a class to subtract from, got one")
        if output is not None and not callable(output):
            raise TypeError(f"output: expected a function of the model's output or None, got {type(output).__name__}")
        self.classes = None if classes is None else _integers("target", classes)
        self.minus = None if minus is None else _integers("minus", minus)
        self.link, self.output = link, output
        self.may_read_patches = output is not None  # a function of the user's own may read any token of the output

    @staticmethod
    def similarity(embedding: Tensor, scale: float = 1.0, output: Select | None = None) -> Target:
        """The cosine similarity of the model's embedding and ``embedding``, times ``scale``.

        Args:
            embedding: [D], or [B, D] with one per image, as of a text or of another image.
            output: where the embedding [B, D] is in the model's output, as for :class:`Target`.
        """
        return Similarity(embedding, scale, output)

    def __repr__(self) -> str:
        minus = "" if self.minus is None else f", minus={self.minus.tolist()}"
        return f"Target({None if self.classes is None else self.classes.tolist()}{minus}, link={self.link!r})"

    # One entry per image ---------------------------------------------------------------------------------------

    def per_image(self) -> dict[str, Tensor]:
        """{name: tensor} of the parts that have one entry per image."""
        parts = {"target": self.classes, "minus": self.minus}
        return {name: part for name, part in parts.items() if part is not None and part.ndim > 0}

    def __getitem__(self, rows: Any) -> Target:
        """This target for ``rows`` of the images: an index, a slice or a mask."""

        def cut(part: Tensor | None) -> Tensor | None:
            return part[rows] if part is not None and part.ndim > 0 else part

        return self._with(classes=cut(self.classes), minus=cut(self.minus))

    def for_one_image(self) -> Target:
        """A target of the same kind for one image, whatever it is: to try a model with."""
        return Target(link=self.link, output=self.output) if self.per_image() else self

    def _with(self, **parts: Any) -> Any:
        other = copy.copy(self)
        other.__dict__.update(parts)
        return other

    # Reading -----------------------------------------------------------------------------------------------------

    needs_logits = True

    def bound(self, output: Select) -> Target:
        """This target, which finds the logits by ``output`` if it has no function of its own."""
        return self._with(output=output) if self.output is None else self

    def source(self, output: Any, n: int) -> Tensor:
        """The logits [n, classes] in the model's output for ``n`` images."""
        return _matrix((self.output or logits_of)(output), output, n, "logits")

    def of(self, logits: Tensor) -> Target:
        """This target for the images of ``logits`` [B, classes]: the classes are chosen, checked and one per image."""
        B, one = logits.shape[0], logits.shape[1] == 1
        n = 2 if one else logits.shape[1]
        if n == 0:
            raise ValueError(f"model: expected logits of at least one class, got {list(logits.shape)}")
        if one and self.link == "softmax":
            raise ValueError("link: expected 'auto', 'sigmoid' or None for a model with one logit, got 'softmax'")
        if one and self.minus is not None:
            raise ValueError("minus: expected None for a model with one logit, got a class")
        if one and self.link == "auto":
            _log_one_logit()
        if self.classes is None:
            classes = logits.argmax(1) if not one else (logits[:, 0] > 0).long()
        else:
            classes = _in_range("target", self.classes, B, n).to(logits.device)
        minus = None if self.minus is None else _in_range("minus", self.minus, B, n).to(logits.device)
        if minus is not None and bool((minus == classes).any()):
            raise ValueError("minus: expected another class than the target's, got the same")
        link = self.link if self.link != "auto" else None if minus is not None else "sigmoid" if one else "softmax"
        return self._with(classes=classes, minus=minus, link=link)

    def value(self, output: Any, n: int) -> Tensor:
        """What is explained, per image [n]: the logit, or the difference of two. For a target from :meth:`of`."""
        return self._logit(_widened(self.source(output, n)))

    def read(self, output: Any, n: int) -> tuple[Tensor, Tensor, Tensor]:
        """Per image, each float64 [n]: the value, the probability (the value if there is none), the largest one."""
        return self.read_kept(self.keep(output, n))

    def keep(self, output: Any, n: int) -> Tensor:
        """What :meth:`read_kept` needs of the output, [n, width]."""
        return self.source(output, n)

    def read_kept(self, kept: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """:meth:`read` of what :meth:`keep` has kept."""
        logits = kept.double()
        logit = self._logit(logits)
        if self.minus is not None:
            return logit, logit.sigmoid() if self.link == "softmax" else logit, torch.full_like(logit, torch.nan)
        if self.link is None:
            return logit, logit, torch.full_like(logit, torch.nan)
        prob = probabilities(logits) if self.link == "softmax" else _both_sides(logits).sigmoid()
        assert self.classes is not None  # of
        return logit, prob.gather(1, self.classes.to(prob.device)[:, None])[:, 0], prob.amax(-1)

    @property
    def has_largest(self) -> bool:
        """Whether :meth:`read` gives the largest probability of any class."""
        return self.minus is None and self.link is not None

    def _logit(self, logits: Tensor) -> Tensor:
        assert self.classes is not None  # of
        both = _both_sides(logits)
        value = both.gather(1, self.classes.to(both.device)[:, None])[:, 0]
        return value if self.minus is None else value - both.gather(1, self.minus.to(both.device)[:, None])[:, 0]


class Similarity(Target):
    """See :meth:`Target.similarity`."""

    needs_logits = False
    has_largest = False

    def __init__(self, embedding: Tensor, scale: float = 1.0, output: Select | None = None) -> None:
        super().__init__(link=None, output=output)
        fits = isinstance(embedding, Tensor) and embedding.is_floating_point() and embedding.ndim in (1, 2)
        if not fits or not embedding.shape[-1]:
            got = f"{embedding.dtype} {list(embedding.shape)}" if isinstance(embedding, Tensor) else type(embedding)
            raise ValueError(f"embedding: expected a floating tensor [D] or [B, D], got {got}")
        if not bool(embedding.isfinite().all()) or bool((embedding == 0).all(-1).any()):
            raise ValueError("embedding: expected finite vectors that are not zero, got one that is")
        if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not 0 < scale < float("inf"):
            raise ValueError(f"scale: expected a number > 0, got {scale!r}")
        self.embedding, self.scale = embedding.detach(), float(scale)

    def __repr__(self) -> str:
        return f"Target.similarity({list(self.embedding.shape)}, scale={self.scale:g})"

    def per_image(self) -> dict[str, Tensor]:
        return {"embedding": self.embedding} if self.embedding.ndim == 2 else {}

    def __getitem__(self, rows: Any) -> Target:
        return self._with(embedding=self.embedding[rows]) if self.embedding.ndim == 2 else self

    def for_one_image(self) -> Target:
        one = self.embedding.new_ones(1, self.embedding.shape[-1])
        return self._with(embedding=one) if self.embedding.ndim == 2 else self

    def source(self, output: Any, n: int) -> Tensor:
        found = _matrix((self.output or logits_of)(output), output, n, "embeddings")
        if found.shape[1] != self.embedding.shape[-1]:
            raise ValueError(
                f"embedding: expected width {found.shape[1]}, as the model's embedding, got {self.embedding.shape[-1]}"
            )
        return found

    def of(self, logits: Tensor) -> Target:
        if self.embedding.ndim == 2 and len(self.embedding) != len(logits):
            raise ValueError(f"embedding: expected one per image ({len(logits)}), got {list(self.embedding.shape)}")
        return self

    def value(self, output: Any, n: int) -> Tensor:
        return self._cosine(_widened(self.source(output, n)))

    def read_kept(self, kept: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        value = self._cosine(kept.double())
        return value, value, torch.full_like(value, torch.nan)

    def _cosine(self, found: Tensor) -> Tensor:
        given = F.normalize(self.embedding.to(found), dim=-1)
        return self.scale * (F.normalize(found, dim=-1) * given).sum(-1)


class Function(Target):
    """A target function of the user's own: the model's output -> one value per image."""

    needs_logits = False
    has_largest = False

    def __init__(self, function: TargetFunction) -> None:
        super().__init__(link=None)
        self.may_read_patches = True
        self.function = function

    def __repr__(self) -> str:
        return f"Target function {getattr(self.function, '__name__', type(self.function).__name__)}"

    def bound(self, output: Select) -> Target:
        return self  # it gets the model's own output

    def source(self, output: Any, n: int) -> Tensor:
        """The output itself where it is a matrix, else the values [n, 1]."""
        if isinstance(output, Tensor) and output.ndim == 2 and output.is_floating_point():
            return output
        return self.value(output, n)[:, None]

    def of(self, logits: Tensor) -> Target:
        return self

    def value(self, output: Any, n: int) -> Tensor:
        """``function(output)``, checked to be one value per image: floating [n]. The function may write into it.

        It gets float32 in place of half precision, in which a probability near 1 is 1, and its gradient noise.
        """
        try:
            value = self.function(map_tensors(output, lambda t: _widened(t.clone())))
        except RuntimeError as error:
            if "same dtype" not in str(error) and "scalar type" not in str(error):
                raise
            raise RuntimeError(
                f"target: expected a function of float32, which it gets in place of half precision ({error})"
            ) from error
        if not isinstance(value, Tensor) or list(value.shape) != [n] or not value.is_floating_point():
            got = f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"target: expected a function that returns one value per image, [{n}], got {got}")
        return value

    def keep(self, output: Any, n: int) -> Tensor:
        return self.value(output, n)[:, None]

    def read_kept(self, kept: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        value = kept[:, 0].double()
        return value, value, torch.full_like(value, torch.nan)


TargetLike = int | Sequence[int] | Tensor | TargetFunction | Target | None


def as_target(given: TargetLike) -> Target:
    """``given`` as a :class:`Target`: a class, one per image, None for the predicted one, or a function."""
    if isinstance(given, Target):
        return given
    return Function(given) if callable(given) else Target(given)


def as_given(given: TargetLike, resolved: Target) -> Any:
    """What a result names as its target: classes [B] for classes, else the ``given`` function or the target."""
    if isinstance(given, Target):
        return resolved
    return given if callable(given) else resolved.classes


def probabilities(logits: Tensor) -> Tensor:
    """Class probabilities [B, classes]: the softmax, or ``(1 - sigmoid(z), sigmoid(z))`` for a single logit ``z``.

    Those of logits of half precision are float32.
    """
    logits = _widened(logits)
    return _both_sides(logits).sigmoid() if logits.shape[1] == 1 else logits.softmax(-1)


def logits_of(output: Any) -> Any:
    """The logits in a model's output: the output itself, or its field or key ``logits``."""
    if isinstance(output, Mapping):
        return output.get("logits")
    return output if isinstance(output, Tensor) else getattr(output, "logits", None)


def map_tensors(output: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """``output`` with ``change`` applied to each tensor in it, inside of tuples, lists, mappings and data classes."""
    if isinstance(output, Tensor):
        return change(output)
    if isinstance(output, Mapping):
        made = {name: map_tensors(part, change) for name, part in output.items()}
        return made if type(output) is dict else type(output)(**made)
    if isinstance(output, (tuple, list)):
        parts = [map_tensors(part, change) for part in output]
        return type(output)(*parts) if hasattr(output, "_fields") else type(output)(parts)
    if hasattr(output, "__dict__") and not callable(output):
        other = copy.copy(output)
        for name, part in vars(output).items():
            if isinstance(part, (Tensor, Mapping, tuple, list)):
                object.__setattr__(other, name, map_tensors(part, change))
        return other
    return output


def _matrix(found: Any, output: Any, n: int, what: str) -> Tensor:
    """``found``, checked to be floating [n, width]."""
    if not isinstance(found, Tensor) or found.ndim != 2 or len(found) != n or not found.is_floating_point():
        seen = output if found is None else found
        got = f"{seen.dtype} {list(seen.shape)}" if isinstance(seen, Tensor) else type(seen).__name__
        hint = "" if isinstance(output, Tensor) else f" (fastfg.Target(..., output=...) says where the {what} are)"
        raise ValueError(f"model: expected floating {what} [{n}, n] from model(images), got {got}{hint}")
    return found


def _widened(t: Tensor) -> Tensor:
    """``t`` in float32 if it is of half precision. Its gradient is rounded once, on its way back."""
    return t.float() if t.dtype in (torch.float16, torch.bfloat16) else t


def _both_sides(logits: Tensor) -> Tensor:
    """The logits of all classes: ``(-z, z)`` for a single logit ``z``."""
    return torch.cat([-logits, logits], dim=1) if logits.shape[1] == 1 else logits


def _in_range(name: str, classes: Tensor, B: int, n: int) -> Tensor:
    """``classes`` as one per image [B], each from 0 to n - 1."""
    if classes.ndim and list(classes.shape) != [B]:
        raise ValueError(f"{name}: expected one class, or one per image ({B}), got {list(classes.shape)}")
    each = classes.expand(B).clone()
    wrong = each[(each < 0) | (each >= n)]
    if wrong.numel():
        raise ValueError(f"{name}: expected classes from 0 to {n - 1}, got {list(dict.fromkeys(wrong.tolist()))[:8]}")
    return each


def _integers(name: str, given: Any) -> Tensor:
    """``given`` as int64, [] or [B]."""
    expected = f"{name}: expected an int, a sequence of ints or a LongTensor, one class per image, got"
    if isinstance(given, bool) or (isinstance(given, Tensor) and (given.is_floating_point() or given.ndim > 1)):
        raise TypeError(f"{expected} {given!r}")
    try:
        classes = given if isinstance(given, Tensor) else torch.as_tensor(given, device="cpu")
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{expected} {given!r}") from None
    if classes.dtype == torch.bool or (classes.is_floating_point() and classes.numel()):
        raise TypeError(f"{name}: expected integers, got {classes.dtype}")
    if classes.ndim > 1:
        raise ValueError(f"{name}: expected one class, or one per image, got {list(classes.shape)}")
    return classes.long()


def _log_one_logit() -> None:
    """Log once that a single logit is read as a sigmoid."""
    global _logged_one_logit
    if not _logged_one_logit:
        log.info("the model has one logit z, read as a sigmoid: class 1 is sigmoid(z), class 0 is 1 - sigmoid(z)")
        _logged_one_logit = True
