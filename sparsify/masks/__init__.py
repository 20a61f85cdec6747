"""Masks as files: packed, compared, imported, and swapped over one model."""

from typing import TYPE_CHECKING

from sparsify.lazy import lazy

if TYPE_CHECKING:
    from sparsify.masks.file import MaskFile, MaskWriter, read_masks, write_masks
else:  # what shows a mask file needs no PyTorch
    __getattr__, __dir__ = lazy(
        __name__,
        dict.fromkeys(
            ("MaskFile", "MaskWriter", "read_masks", "write_masks"), "sparsify.masks.file"
        ),
    )

__all__ = ["MaskFile", "MaskWriter", "read_masks", "write_masks"]
