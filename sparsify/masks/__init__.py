"""Masks as files: packed, compared, imported, and swapped over one model."""

from sparsify.masks.file import MaskFile, MaskWriter, read_masks, write_masks

__all__ = ["MaskFile", "MaskWriter", "read_masks", "write_masks"]
