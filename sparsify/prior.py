"""A mask to start from: any strategy's, or one that was saved.

Shapes: O out, I in.
"""

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from sparsify.errors import SparsifyError
from sparsify.mask_file import find_file, read_masks
from sparsify.masker import Masker
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
        # Of a local path the last part, as records travel; the hash says which masks they were.
        description["settings"]["path"] = Path(self.path).resolve().name
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


class StartsFromPrior(SparsityStrategy):
    """A strategy that learns from another one's masks on: define ``start``.

    Args:
        prior: whose masks: a strategy by name or as an object, a mask file or an exported folder;
            None starts from nothing.
    """

    def __init__(self, prior: SparsityStrategy | str | None = None) -> None:
        super().__init__()
        self.prior = None if prior is None else make_prior(prior)

    def start(
        self, masker: Masker, weight_OI: Tensor, prior_OI: Tensor | None, row0: int = 0
    ) -> None:
        """Give the masker its first values.

        Args:
            masker: what ``make_masker`` made.
            weight_OI: the layer's weight, or rows of it.
            prior_OI: the prior's mask of these rows, bool; None without a prior.
            row0: the number of the first row in the whole layer.
        """
        raise NotImplementedError(f"{type(self).__name__} must define start")

    def calibrate(self, blocks: Iterable[Block]) -> Iterator[tuple[str, LayerResult]]:
        return iter(()) if self.prior is None else self.prior.calibrate(blocks)

    def calibrator(self) -> SparsityStrategy:
        return self if self.prior is None else self.prior

    def init_masker(
        self, masker: Masker, weight_OI: Tensor, result: LayerResult | None, row0: int = 0
    ) -> None:
        """Check the prior's mask and :meth:`start` from it.

        Raises:
            SparsifyError: the prior has no mask of this layer, or one of another shape or pattern.
        """
        if self.prior is None:
            return self.start(masker, weight_OI, None, row0)
        if result is None:
            raise SparsifyError(
                f"{masker.name}: the prior {type(self.prior).__name__} holds no mask of it; "
                "it must cover every masked layer"
            )
        pattern = masker.pattern
        if result.mask.shape != weight_OI.shape:
            raise SparsifyError(
                f"{masker.name}: the prior's mask is {tuple(result.mask.shape)} and the weight is "
                f"{tuple(weight_OI.shape)}; take a prior made for this model"
            )
        if (pattern.groups(result.mask).sum(-1) != pattern.n).any():
            raise SparsifyError(
                f"{masker.name}: the prior does not keep {pattern.n} weights of every "
                f"{pattern.m}; take a prior made for the pattern {pattern}"
            )
        return self.start(masker, weight_OI, result.mask, row0)
