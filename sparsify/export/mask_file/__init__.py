"""Mask files, which hold the masks of a model in close to the fewest bits."""

from typing import TYPE_CHECKING

from sparsify.common.lazy import lazy

if TYPE_CHECKING:
    from sparsify.export.mask_file.file import MaskFile, MaskWriter, read_masks, write_masks
else:  # so that the parts that only show a mask file do not import PyTorch
    __getattr__, __dir__ = lazy(
        __name__,
        dict.fromkeys(
            ("MaskFile", "MaskWriter", "read_masks", "write_masks"),
            "sparsify.export.mask_file.file",
        ),
    )

__all__ = ["MaskFile", "MaskWriter", "read_masks", "write_masks"]
