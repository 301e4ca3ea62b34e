"""Images from files and folders, and the manifests that say what they are. Unreadable files have a reason."""

from fastfg.data.folder import Batch, FileError, Found, batches, find_images, path_text
from fastfg.data.image import Picture, read_image
from fastfg.data.manifest import Manifest, class_counts, read_manifest, write_manifest
from fastfg.data.mask import read_mask
from fastfg.data.splits import from_folder, split

__all__ = [
    "Batch",
    "FileError",
    "Found",
    "Manifest",
    "Picture",
    "batches",
    "class_counts",
    "find_images",
    "from_folder",
    "path_text",
    "read_image",
    "read_manifest",
    "read_mask",
    "split",
    "write_manifest",
]
