"""A mask to start from: any strategy's, or one that was saved."""

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from sparsify.mask_file import find_file, read_masks
from sparsify.registry import make_strategy
from sparsify.strategy import Block, LayerResult, SparsityStrategy


class SavedMasks(SparsityStrategy):
    """The masks of a mask file, or of a folder that was exported.

    Args:
        path: the file or folder.
    """

    def __init__(self, path: str) -> None:
        super().__init__()
        self.path = path

    def calibrate(self, blocks: Iterable[Block]) -> Iterator[tuple[str, LayerResult]]:
        saved = read_masks(Path(self.path)).masks
        for block in blocks:
            for name in block.layers:
                if name in saved:
                    yield name, LayerResult(saved[name])

    def describe(self) -> dict[str, Any]:
        file = find_file(Path(self.path))
        description = super().describe()
        description["settings"]["sha256"] = hashlib.sha256(file.read_bytes()).hexdigest()
        return description


def make_prior(prior: SparsityStrategy | str | None) -> SparsityStrategy | None:
    """The strategy whose masks another one starts from.

    Args:
        prior: a strategy, the name of one, a mask file or an exported folder.
    """
    if not isinstance(prior, str):
        return prior
    return SavedMasks(prior) if Path(prior).exists() else make_strategy(prior)
