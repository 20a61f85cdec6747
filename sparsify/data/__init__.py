"""Text sources, their token blocks, and the data module that feeds these to training."""

from sparsify.data.module import TextDataModule
from sparsify.data.sources import Source

__all__ = ["Source", "TextDataModule"]
