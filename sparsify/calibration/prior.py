"""Priors: masks to start from, made by any strategy or read from a file.

Shapes: O out, I in, G groups, M group size.
"""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from sparsify.calibration.statistics import Moments
from sparsify.common.errors import SparsifyError
from sparsify.export.mask_file.file import read_masks
from sparsify.export.mask_file.index import SUFFIX, find_file
from sparsify.masking.experts import Expert
from sparsify.masking.layer import MaskedLinear
from sparsify.masking.pattern import NMPattern
from sparsify.masking.registry import STRATEGIES, make_strategy, plugins
from sparsify.masking.strategy import (
    Block,
    LayerResult,
    M,
    SparsityStrategy,
    goes_on_by_block,
)
from sparsify.models.permutation_file import Permutation, check_same_order


class SavedMasks(SparsityStrategy):
    """The masks of a mask file or of an exported folder.

    Args:
        path: the file or folder.
    """

    def __init__(self, path: str) -> None:
        super().__init__()
        # Only the last part of the path, as records may be published; the digest names the masks.
        self.path = Path(path).resolve().name
        self._file = find_file(Path(path))
        # A run that is restored from a checkpoint no longer needs the file.
        self.digest = read_masks(self._file).digest if self._file.is_file() else ""

    def calibrate(self, blocks: Iterable[Block]) -> Iterator[tuple[str, LayerResult]]:
        saved = read_masks(self._file)
        for block in blocks:
            read, mask_OI = "", torch.empty(0)  # the mask of all of a block's experts is one
            for name, layer in block.layers.items():
                stack = layer.stack if isinstance(layer, Expert) else name
                if stack not in saved:
                    continue
                if stack != read:
                    read, mask_OI = stack, saved[stack]
                yield name, LayerResult(_of_layer(layer, mask_OI))

    def input_scale(self, gram_II: Tensor) -> Tensor:
        raise SparsifyError(
            f"prior {self.path}: its masks are of one order of channels, so that no other can be "
            "searched for them; leave --model.permute out, or give it the folder of the prior's "
            "export, whose orders are taken"
        )

    def check_order(self, permutation: Permutation | None) -> None:
        """Refuse masks of another order of channels than the model's.

        Args:
            permutation: that of the model.
        """
        if not self._file.is_file():
            return
        check_same_order(
            read_masks(self._file).permutation, permutation, f"prior {self.path}", "this run"
        )


def _of_layer(layer: MaskedLinear | Expert, mask_OI: Tensor) -> Tensor:
    """The mask of a layer, from that of all experts where it is one of them."""
    whole = layer.layer if isinstance(layer, Expert) else layer
    if mask_OI.shape != whole.masker.shape:
        raise SparsifyError(
            f"{whole.masker.name}: the prior's mask is {tuple(mask_OI.shape)} but the weight is "
            f"{tuple(whole.masker.shape)}; take a prior made for this model"
        )
    return mask_OI[layer.rows] if isinstance(layer, Expert) else mask_OI


class _Around(SparsityStrategy):
    """Calibrates as another strategy does, and changes its results.

    Args:
        strategy: the strategy that makes the results.
    """

    def __init__(self, strategy: SparsityStrategy) -> None:
        super().__init__()
        self.strategy = strategy
        self.independent_blocks = goes_on_by_block(strategy)

    def input_scale(self, gram_II: Tensor) -> Tensor:
        return self.strategy.input_scale(gram_II)

    def order_score(self, weight_OI: Tensor, scale_I: Tensor) -> Tensor:
        return self.strategy.order_score(weight_OI, scale_I)


class MasksOnly(_Around):
    """Only the masks of a strategy that would update weights too; later blocks are calibrated with
    these masks on the original weights.
    """

    def calibrate(self, blocks: Iterable[Block]) -> Iterator[tuple[str, LayerResult]]:
        for name, result in self.strategy.calibrate(blocks):
            yield name, replace(result, weight=None)


class WithInputs(_Around):
    """A strategy's results, and with each layer's how large its inputs are. For learners whose
    start depends on what a weight adds to its layer's output.
    """

    def calibrate(self, blocks: Iterable[Block]) -> Iterator[tuple[str, LayerResult]]:
        norms: dict[str, Tensor] = {}

        def measured() -> Iterator[Block]:
            for block in blocks:
                norms.update((n, m.norm_I) for n, m in block.collect(Moments).items())
                yield block

        for name, result in self.strategy.calibrate(measured()):
            yield name, replace(result, inputs=norms[name])


def make_prior(prior: SparsityStrategy | str, weights: bool = False) -> SparsityStrategy:
    """Make the strategy whose masks another one starts from.

    Args:
        prior: a one-shot strategy or its name, or the path of a mask file or exported folder.
        weights: let its results hold updated weights too, if it has any.

    Raises:
        SparsifyError: the prior is unknown, or is a strategy that learns its masks.
    """
    if isinstance(prior, str):
        prior = SavedMasks(prior) if _is_path(prior) else make_strategy(prior)
        prior = prior if weights else prior.as_prior()
    if isinstance(prior, StartsFromPrior):
        raise SparsifyError(
            f"prior {type(prior).__name__}: it learns its masks, which takes a run of its own; "
            "name the folder that this run exported, or a one-shot strategy"
        )
    return prior if weights or prior.effect.only_masks else MasksOnly(prior)


def _is_path(prior: str) -> bool:
    """Whether the text is a path of saved masks. They need not exist: a run that is restored from a
    checkpoint no longer needs its prior.
    """
    if prior.lower() in plugins(STRATEGIES):
        return False
    return "/" in prior or Path(prior).suffix == SUFFIX or Path(prior).exists()


def favour(weight_OI: Tensor, prior_OI: Tensor, pattern: NMPattern) -> Tensor:
    """Change weights as little as possible so that the prior keeps the largest of each group.

    This is how a mask that follows the magnitude of trained weights starts from a prior. Only
    groups in which the prior does not keep the largest weights change. There, dropped weights are
    shrunk to just below the smallest kept one, with their signs. Kept weights stay, except zeros
    and subnormal numbers, which become the smallest normal number.

    Args:
        weight_OI: any floating dtype; it is not changed.
        prior_OI: bool, True for ``n`` of every ``m``.
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
    """A strategy that starts to learn from the masks of another; a subclass may define ``start``.

    Args:
        prior: where the masks come from: a strategy by name or as an object, a mask file or an
            exported folder; None starts from the largest weights.
        weights: also start from the weights that the prior updates; only for a strategy that
            trains the base weights. They are put in place after ``start``.
    """

    def __init__(self, prior: SparsityStrategy | str | None = None, weights: bool = False) -> None:
        super().__init__()
        self.prior = None if prior is None else make_prior(prior, weights)

    def start(self, masker: M, weight_OI: Tensor, prior_OI: Tensor, row0: int = 0) -> None:
        """Set the masker's first values; by default it takes over the mask.

        Args:
            masker: the masker that ``make_masker`` made.
            weight_OI: the layer's weight, or rows of it.
            prior_OI: the prior's mask of these rows, bool; without a prior that of the largest
                weights.
            row0: the number of the first row in the whole layer.
        """
        masker.set_mask(prior_OI)

    def calibrate(self, blocks: Iterable[Block]) -> Iterator[tuple[str, LayerResult]]:
        return iter(()) if self.prior is None else self.prior.calibrate(blocks)

    def calibrator(self) -> SparsityStrategy:
        own = type(self).calibrate is not StartsFromPrior.calibrate
        return self if own or self.prior is None else self.prior

    def input_scale(self, gram_II: Tensor) -> Tensor:
        if self.prior is not None:
            return self.prior.input_scale(gram_II)
        return torch.ones_like(gram_II.diagonal())  # the largest weights are where it starts

    def order_score(self, weight_OI: Tensor, scale_I: Tensor) -> Tensor:
        if self.prior is not None:
            return self.prior.order_score(weight_OI, scale_I)
        return super().order_score(weight_OI, scale_I)

    def init_masker(
        self, masker: M, weight_OI: Tensor, result: LayerResult | None, row0: int = 0
    ) -> None:
        """Check the prior's mask and :meth:`start` from it.

        Raises:
            SparsifyError: the prior has no mask for this layer, or one of another shape or pattern.
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
                f"{masker.name}: the prior's mask is {tuple(result.mask.shape)} but the weight is "
                f"{tuple(weight_OI.shape)}; take a prior made for this model"
            )
        if (pattern.groups(result.mask).sum(-1) != pattern.n).any():
            raise SparsifyError(
                f"{masker.name}: the prior does not keep {pattern.n} weights of every "
                f"{pattern.m}; take a prior made for the pattern {pattern}"
            )
        return self.start(masker, weight_OI, result.mask, row0)
