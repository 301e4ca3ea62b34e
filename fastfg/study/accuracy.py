"""How good a classifier is, said so that unequal classes can't flatter it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

FEW = 20  # images of a class, below which its accuracy is named as uncertain
COLUMNS = ("split", "label", "images", "correct", "accuracy", "low", "high", "predicted")


@dataclass(frozen=True)
class Accuracy:
    """The counts of a classifier's answers.

    Args:
        labels: the n classes.
        confusion: [n, n] counts; rows are the true classes, columns the answers.
    """

    labels: tuple[str, ...]
    confusion: tuple[tuple[int, ...], ...]

    @classmethod
    def read(cls, labels: Any, confusion: Any, file: Path) -> Accuracy:
        """The counts as JSON has them. Raises ValueError that names the ``file`` for others than [n, n] counts."""
        named = isinstance(labels, list) and all(isinstance(label, str) for label in labels)
        rows = confusion if isinstance(confusion, list) else []
        counts = all(isinstance(row, list) and all(type(n) is int for n in row) for row in rows)
        if not named or not counts or {len(labels)} != {len(rows), *map(len, rows)}:
            raise ValueError(f"{file}: expected labels and [n, n] counts, got {labels!r:.80} and {confusion!r:.80}")
        return cls(tuple(labels), tuple(map(tuple, confusion)))

    @classmethod
    def of(cls, labels: Sequence[str], true: Sequence[int], predicted: Sequence[int]) -> Accuracy:
        """Count answers. ``true`` and ``predicted`` are indices into ``labels``.

        >>> from fastfg.study.accuracy import Accuracy
        >>> always_a = Accuracy.of(("a", "b"), true=[0, 0, 0, 1], predicted=[0, 0, 0, 0])
        >>> always_a.accuracy, always_a.majority, always_a.balanced
        (0.75, ('a', 0.75), 0.5)
        """
        counts = np.zeros((len(labels), len(labels)), dtype=int)
        np.add.at(counts, (np.asarray(true, dtype=int), np.asarray(predicted, dtype=int)), 1)
        return cls(tuple(labels), tuple(tuple(map(int, row)) for row in counts))

    @property
    def images(self) -> int:
        """The number of images."""
        return int(np.sum(self.confusion))

    @property
    def accuracy(self) -> float:
        """The share of right answers; NaN without images."""
        return float(np.trace(np.array(self.confusion))) / self.images if self.images else float("nan")

    @property
    def majority(self) -> tuple[str, float]:
        """The most frequent class, and the accuracy of always answering it."""
        sizes = np.sum(self.confusion, axis=1)
        largest = int(np.argmax(sizes))
        return self.labels[largest], float(sizes[largest] / self.images) if self.images else float("nan")

    @property
    def balanced(self) -> float:
        """The mean of the classes' accuracies, over the classes that have images; always answering one gives 1/n."""
        shares = [row["accuracy"] for row in self.by_class() if row["images"]]
        return float(np.mean(shares)) if shares else float("nan")

    def by_class(self) -> list[dict[str, Any]]:
        """One row per class: its images, how many were right, their share with a 95% Wilson interval, and how often
        the class was the answer. The share of a class without images is None.
        """
        from scipy.stats import binomtest

        rows = []
        for i, label in enumerate(self.labels):
            images, correct = sum(self.confusion[i]), self.confusion[i][i]
            share, low, high = None, None, None
            if images:
                interval = binomtest(correct, images).proportion_ci(method="wilson")
                share, low, high = correct / images, float(interval.low), float(interval.high)
            predicted = sum(row[i] for row in self.confusion)
            values = (label, images, correct, share, low, high, predicted)
            rows.append(dict(zip(COLUMNS[1:], values, strict=True)))
        return rows

    def sentences(self, split: str) -> list[str]:
        """What there is to say about this split, for people: accuracy beside its majority class, and by class."""
        if not self.images:
            return [f"{split}: no images, so no accuracy"]
        label, share = self.majority
        lines = [
            f"{split}: balanced accuracy {self.balanced:.1%}, accuracy {self.accuracy:.1%} on {self.images} images "
            f"(always {label!r}: {share:.1%})"
        ]
        for row in self.by_class():
            if row["images"]:
                few = ", few images" if row["images"] < FEW else ""
                interval = f"95% interval {row['low']:.1%} to {row['high']:.1%}{few}"
                lines.append(
                    f"  {row['label']}: {row['correct']} of {row['images']} = {row['accuracy']:.1%} ({interval})"
                )
            else:
                lines.append(f"  {row['label']}: no images, so it is not in the balanced accuracy")
        if self.accuracy <= share:
            lines.append(f"  Its accuracy is no better than that of always answering {label!r}.")
        elif self.balanced <= 1 / max(1, sum(bool(row["images"]) for row in self.by_class())):
            lines.append("  Its balanced accuracy is no better than that of always giving one answer.")
        return lines
