"""Images from files and folders, in batches; a file that can't be read is named, and the rest goes on."""

from fastfg.data.folder import Batch, FileError, batches, find_images

__all__ = ["Batch", "FileError", "batches", "find_images"]
