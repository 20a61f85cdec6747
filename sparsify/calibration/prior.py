"""A mask to start from: any strategy's, or one that was saved.

Shapes: O out, I in, G groups, M group size.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from sparsify.common.errors import SparsifyError
from sparsify.export.mask_file.file import read_masks
from sparsify.export.mask_file.index import SUFFIX, find_file
from sparsify.masking.pattern import NMPattern
from sparsify.masking.registry import STRATEGIES, make_strategy, plugins
from sparsify.masking.strategy import Block, LayerResult, M, SparsityStrategy


class SavedMasks(SparsityStrategy):
    """The masks of a mask file, or of a folder that was exported.

    Args:
        path: the file or folder.
    """

    def __init__(self, path: str) -> None:
        super().__init__()
        # Of a local path the last part, as records travel; the digest says which masks they were.
        self.path = Path(path).resolve().name
        self._file = find_file(Path(path))
        # What a checkpoint restores does not need the file any more.
        self.digest = read_masks(self._file).digest if self._file.is_file() else ""

    def calibrate(self, blocks: Iterable[Block]) -> Iterator[tuple[str, LayerResult]]:
        saved = read_masks(self._file)
        for block in blocks:
            for name in block.layers:
                if name in saved:
                    yield name, LayerResult(saved[name])


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


def make_prior(prior: SparsityStrategy | str, weights: bool = False) -> SparsityStrategy:
    """The strategy whose masks another one starts from.

    Args:
        prior: a one-shot strategy, the name of one, a mask file or an exported folder.
        weights: let its results hold weights too, if it updates them.

    Raises:
        SparsifyError: it is unknown, or learns its masks.
    """
    if isinstance(prior, str):
        prior = SavedMasks(prior) if _is_path(prior) else make_strategy(prior)
    if isinstance(prior, StartsFromPrior):
        raise SparsifyError(
            f"prior {type(prior).__name__}: it learns its masks in a run of its own; name the "
            "folder that this run exported, or a one-shot strategy"
        )
    return prior if weights or prior.effect.only_masks else MasksOnly(prior)


def _is_path(prior: str) -> bool:
    """Whether the text names masks that were saved, were they there or not: what a checkpoint
    restores needs no prior any more.
    """
    if prior.lower() in plugins(STRATEGIES):
        return False
    return "/" in prior or Path(prior).suffix == SUFFIX or Path(prior).exists()


def favour(weight_OI: Tensor, prior_OI: Tensor, pattern: NMPattern) -> Tensor:
    """Weights whose largest magnitudes are the prior's choice, as near to the given as can be.

    Where a mask is a function of weights that learn, this is how it starts from a prior. In groups
    where the prior differs from magnitude, weights that it drops are brought just below the
    smallest that it keeps, with their signs; kept ones stay, but for zeros (and numbers that are
    not normal), which become the smallest normal number. All other groups stay.

    Args:
        weight_OI: any floating dtype; it is not changed.
        prior_OI: bool, ``n`` of every ``m``.
        pattern: the pattern.

    Returns:
        ``[O, I]`` of the weight's dtype, with ``pattern.top(result.abs())`` equal to the prior.
    """
    agrees_OG = pattern.groups(pattern.top(weight_OI.abs()) == prior_OI).all(-1, keepdim=True)
    weight_OGM, kept_OGM = pattern.groups(weight_OI), pattern.groups(prior_OI)
    size_OGM, tiny = weight_OGM.abs(), torch.finfo(weight_OI.dtype).tiny
    raised_OGM = size_OGM.clamp(min=tiny)
    least_OG = raised_OGM.masked_fill(~kept_OGM, torch.inf).amin(-1, keepdim=True)
    below_OG = torch.nextafter(least_OG, torch.zeros_like(least_OG))
    below_OG.masked_fill_(below_OG < tiny, 0)
    size_OGM = torch.where(kept_OGM, raised_OGM, size_OGM.minimum(below_OG))
    return torch.where(agrees_OG, weight_OGM, size_OGM.copysign(weight_OGM)).flatten(-2)


class StartsFromPrior(SparsityStrategy[M]):
    """A strategy that learns from another one's masks on: define ``start``.

    Args:
        prior: whose masks: a strategy by name or as an object, a mask file or an exported folder;
            None starts from nothing.
        weights: start from its weights too, if it updates them; only for a strategy that trains
            the base weights. They are in place after ``start``.
    """

    def __init__(self, prior: SparsityStrategy | str | None = None, weights: bool = False) -> None:
        super().__init__()
        self.prior = None if prior is None else make_prior(prior, weights)

    def start(self, masker: M, weight_OI: Tensor, prior_OI: Tensor, row0: int = 0) -> None:
        """Give the masker its first values; by default it takes over the mask.

        Args:
            masker: what ``make_masker`` made.
            weight_OI: the layer's weight, or rows of it.
            prior_OI: the prior's mask of these rows, bool; without a prior that of the largest
                weights.
            row0: the number of the first row in the whole layer.
        """
        masker.set_mask(prior_OI)

    def calibrate(self, blocks: Iterable[Block]) -> Iterator[tuple[str, LayerResult]]:
        return iter(()) if self.prior is None else self.prior.calibrate(blocks)

    def calibrator(self) -> SparsityStrategy:
        return self if self.prior is None else self.prior

    def init_masker(
        self, masker: M, weight_OI: Tensor, result: LayerResult | None, row0: int = 0
    ) -> None:
        """Check the prior's mask and :meth:`start` from it.

        Raises:
            SparsifyError: the prior has no mask of this layer, or one of another shape or pattern.
        """
        if self.prior is None:
            return self.start(masker, weight_OI, masker.pattern.top(weight_OI.abs()), row0)
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
