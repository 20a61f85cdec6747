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


class MasksOnly(SparsityStrategy):
    """The masks of a strategy that would update weights too; later blocks see them on the weights
    as they are.

    Args:
        strategy: whose masks.
    """

    def __init__(self, strategy: SparsityStrategy) -> None:
        super().__init__()
        self.strategy = strategy

    def calibrate(self, blocks: Iterable[Block]) -> Iterator[tuple[str, LayerResult]]:
        for name, result in self.strategy.calibrate(blocks):
            yield name, LayerResult(result.mask)


def make_prior(prior: SparsityStrategy | str) -> SparsityStrategy:
    """The strategy whose masks another one starts from; its results hold no weights.

    Args:
        prior: a strategy, the name of one, a mask file or an exported folder.
    """
    if isinstance(prior, str):
        prior = SavedMasks(prior) if Path(prior).exists() else make_strategy(prior)
    return prior if prior.weights == "frozen" else MasksOnly(prior)
