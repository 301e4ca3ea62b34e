"""Read images from files and folders, in batches. Files that cannot be read are reported with a reason."""

from fastfg.data.folder import Batch, FileError, Found, batches, find_images, path_text
from fastfg.data.image import Picture, read_image
from fastfg.data.mask import read_mask

__all__ = [
    "Batch",
    "FileError",
    "Found",
    "Picture",
    "batches",
    "find_images",
    "path_text",
    "read_image",
    "read_mask",
]
