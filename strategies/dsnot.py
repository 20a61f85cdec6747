"""DSnoT: swaps weights in and out of a mask, without training (Zhang et al., ICLR 2024, "Dynamic
Sparse No Training", arXiv 2310.08915).

Shapes: O out, I in, G groups, M group size.
"""

from collections.abc import Iterable, Iterator
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from sparsify.calibration import Moments
from sparsify.calibration.prior import make_prior
from sparsify.common.errors import SparsifyError
from sparsify.masking.pattern import NMPattern
from sparsify.masking.strategy import Block, LayerResult, SparsityStrategy


class DSnoT(SparsityStrategy):
    """Brings the expected output of each row back towards the dense one.

    A row's loss is the sum, over its dropped weights, of ``W_ij`` times the sum of input j over a
    window. In each cycle one dropped weight comes back: the one that reduces this loss most,
    relative to the variance of its input. In its group, the kept weight with the smallest Wanda
    score is dropped for it.

    Args:
        initial: gives the mask to refine: a strategy by name or as an object, a mask file or an
            exported folder.
        cycles: how many swaps are tried in each row at most.
        threshold: a row is left alone once its loss is smaller; the loss is a sum over a window, so
            that longer windows make the threshold stricter.
        skip: globs of layers that keep the initial mask; by default MLPs, as the authors do.
    """

    independent_blocks = True

    def __init__(
        self,
        initial: SparsityStrategy | str = "wanda",
        cycles: int = 50,
        threshold: float = 0.1,
        skip: str | list[str] = "*mlp*",
    ) -> None:
        super().__init__()
        if cycles < 1 or threshold < 0:
            raise SparsifyError(
                f"cycles={cycles}, threshold={threshold}; cycles must be at least 1 and the "
                "threshold not negative"
            )
        self.initial = make_prior(initial)
        self.cycles, self.threshold = cycles, threshold
        self.skip = skip

    def calibrate(self, blocks: Iterable[Block]) -> Iterator[tuple[str, LayerResult]]:
        skip = [self.skip] if isinstance(self.skip, str) else self.skip
        for block in blocks:
            moments = block.collect(Moments)
            for name, result in self.initial.calibrate([block]):
                layer, mask_OI = block.layers[name], result.mask
                if not any(fnmatchcase(name, glob) for glob in skip):
                    mask_OI = self.refine(
                        layer.weight_OI.float(), mask_OI, moments[name], layer.masker.pattern
                    )
                yield name, LayerResult(mask_OI)

    def input_scale(self, gram_II: Tensor) -> Tensor:
        return self.initial.input_scale(gram_II)

    def order_score(self, weight_OI: Tensor, scale_I: Tensor) -> Tensor:
        return self.initial.order_score(weight_OI, scale_I)

    def refine(
        self, weight_OI: Tensor, mask_OI: Tensor, moments: Moments, pattern: NMPattern
    ) -> Tensor:
        """The mask after all swaps, N:M as before.

        Args:
            weight_OI: fp32.
            mask_OI: exactly N:M; it is not changed.
            moments: of the layer's input.
            pattern: of the mask.
        """
        mask_OI = mask_OI.to(weight_OI.device, copy=True)
        mean_I = moments.sum_I / moments.tokens
        variance_I = (moments.square_I / moments.tokens - mean_I.square()).clamp(min=1e-12)
        part_OI = weight_OI * (moments.sum_I / moments.windows)
        loss_O = torch.where(mask_OI, 0, part_OI).sum(1)
        sign_O = loss_O.sign()
        # Dropped weights in the order in which they may come back; a weight moves at most once.
        gain_OI = (sign_O[:, None] * part_OI / variance_I).masked_fill(mask_OI, -torch.inf)
        dropped = round(weight_OI.shape[1] * (1 - pattern.density))
        order_OC = gain_OI.topk(min(self.cycles, dropped), dim=1).indices
        score_OGM = pattern.groups(
            (weight_OI.abs() * moments.norm_I).masked_fill(~mask_OI, torch.inf)
        )
        rows_O = torch.arange(len(weight_OI), device=weight_OI.device)
        active_O = torch.ones_like(rows_O, dtype=torch.bool)
        for grown_O in order_OC.unbind(1):
            group_O = grown_O // pattern.m
            score_O, position_O = score_OGM[rows_O, group_O].min(1)
            pruned_O = group_O * pattern.m + position_O
            possible_O = score_O < torch.inf
            loss_after_O = loss_O + part_OI[rows_O, pruned_O] - part_OI[rows_O, grown_O]
            better_O = (loss_after_O.sign() == sign_O) & (loss_O.abs() > self.threshold)
            swap_O = active_O & possible_O & better_O
            active_O &= better_O | ~possible_O
            rows = rows_O[swap_O]
            mask_OI[rows, grown_O[swap_O]] = True
            mask_OI[rows, pruned_O[swap_O]] = False
            score_OGM[rows, group_O[swap_O], position_O[swap_O]] = torch.inf
            loss_O = torch.where(swap_O, loss_after_O, loss_O)
        return mask_OI
