"""Read files that others wrote, in bounded time and memory. No pickled code is run: a pickle is read as data."""

from fastfg.sae.files.containers import Weights, is_weights, open_weights
from fastfg.sae.files.stored import Refused, Stored
from fastfg.sae.files.unpickle import Record

__all__ = ["Record", "Refused", "Stored", "Weights", "is_weights", "open_weights"]
