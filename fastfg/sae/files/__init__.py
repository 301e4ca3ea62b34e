"""Read files that others wrote, in bounded time and memory. No pickled code is run: a pickle is read as data."""

from fastfg.sae.files.allowed import Record
from fastfg.sae.files.containers import Weights, is_weights, open_weights
from fastfg.sae.files.stored import Stored, UnreadableError

__all__ = ["Record", "Stored", "UnreadableError", "Weights", "is_weights", "open_weights"]
