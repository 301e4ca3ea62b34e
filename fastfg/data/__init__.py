"""Images from folders, and the real data sets of the demo and the tests, read from their PyPI wheels' files."""

from fastfg.data.cells import Cells, load_cells
from fastfg.data.digits import load_digits
from fastfg.data.folder import Batch, FileError, batches, find_images

__all__ = ["Batch", "Cells", "FileError", "batches", "find_images", "load_cells", "load_digits"]
