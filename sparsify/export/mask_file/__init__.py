"""Masks as files: packed, compared, imported, and swapped over one model."""

from typing import TYPE_CHECKING

from sparsify.common.lazy import lazy

if TYPE_CHECKING:
    from sparsify.export.mask_file.file import MaskFile, MaskWriter, read_masks, write_masks
else:  # what shows a mask file needs no PyTorch
    __getattr__, __dir__ = lazy(
        __name__,
        dict.fromkeys(
            ("MaskFile", "MaskWriter", "read_masks", "write_masks"),
            "sparsify.export.mask_file.file",
        ),
    )

__all__ = ["MaskFile", "MaskWriter", "read_masks", "write_masks"]
