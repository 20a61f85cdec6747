"""Swaps: refines any mask by exact swaps inside groups (after SparseSwaps, 2025, arXiv 2512.10922).

For one row of a layer, with weights w, mask m and v = m o w, the squared error of its output
against a target t over all tokens is, but for a constant,

    E = v^T G v - 2 v^T b,    G = X^T X,    b = X^T t.

The target is the dense row's output: on the layer's own input X, so that b = G w, or on the input
that it has in the dense model, so that b = X^T X_dense w. With r = G v - b, dropping the kept
weight p for the dropped weight u changes E by exactly

    dE = (w_p^2 G_pp - 2 w_p r_p) + (w_u^2 G_uu + 2 w_u r_u) - 2 w_p w_u G_pu.

Only swaps with dE < 0 are made, so that each lowers E. Rows do not depend on each other.

Shapes: O out, I in, C columns of a run, M group size.
"""

from collections.abc import Iterable, Iterator
from typing import Literal

import torch
from torch import Tensor

from sparsify.calibration import CrossHessian, Hessian
from sparsify.calibration.prior import make_prior
from sparsify.common.errors import SparsifyError
from sparsify.masking.by_shape import by_shape
from sparsify.masking.effect import Effect
from sparsify.masking.pattern import NMPattern
from sparsify.masking.strategy import Block, LayerResult, SparsityStrategy

COLUMNS = 128  # update r of all later columns once per so many columns, in one product
# What a swap must gain, as a share of the largest w^2 G_ii of its group: more than rounding may
# feign.
LEAST_GAIN = 1e-5
REFIT_STEPS = 50


class Swaps(SparsityStrategy):
    """Goes round the groups and makes the best swap of each, until no swap helps.

    Args:
        initial: gives the mask to refine: a strategy by name or as an object, a mask file or an
            exported folder.
        target: what the layer's output is compared with: ``own``, the output of its dense weights
            on its present input; or ``dense``, its output in the dense model, to make up for the
            blocks that were pruned before. The latter is better in a model of few blocks, and
            harmful in one of many, where masks alone cannot make up for what was lost.
        refit: afterwards change the kept weights, row by row, to those with the least error.
        sweeps: how many times each group is visited at most.
        damping: of the refit: its loss also holds the squared change of the weights, times this
            share of G's mean diagonal.
    """

    independent_blocks = True

    def __init__(
        self,
        initial: SparsityStrategy | str = "sparsegpt",
        target: Literal["dense", "own"] = "own",
        refit: bool = False,
        sweeps: int = 50,
        damping: float = 0.1,
    ) -> None:
        super().__init__()
        if target not in ("dense", "own"):
            raise SparsifyError(f"target={target!r}; it must be 'dense' or 'own'")
        if sweeps < 0 or damping < 0:
            raise SparsifyError(
                f"sweeps={sweeps}, damping={damping}; neither may be negative: 50 and 0.1 are usual"
            )
        self.initial = make_prior(initial)
        self.target: Literal["dense", "own"] = target
        self.refit, self.sweeps, self.damping = refit, sweeps, damping
        self.effect = Effect(weights="updated" if refit else "frozen")

    def calibrate(self, blocks: Iterable[Block]) -> Iterator[tuple[str, LayerResult]]:
        for block in blocks:
            grams = block.collect(Hessian)
            crosses = block.collect(CrossHessian) if self.target == "dense" else grams
            for name, result in self.initial.calibrate([block]):
                layer, gram_II = block.layers[name], grams[name].matrix_II
                weight_IO = layer.weight_OI.T.float().contiguous()
                mask_IO = result.mask.to(weight_IO.device).T.contiguous()
                # X_dense^T X is given for rows; here weights are columns.
                target_IO = crosses[name].matrix_II.T @ weight_IO
                if not target_IO.isfinite().all():
                    raise SparsifyError(
                        f"{name}: its calibration activations overflow or are not numbers; load "
                        "the model with --model.dtype float32 or bfloat16"
                    )
                pattern = layer.masker.pattern
                mask_IO = self.improve(weight_IO, mask_IO, gram_II, target_IO, pattern)
                new_OI = None
                if self.refit:
                    new_IO = refit(weight_IO, mask_IO, gram_II, target_IO, self.damping)
                    new_OI = new_IO.T.to(layer.weight_OI.dtype)
                yield name, LayerResult(mask_IO.T, new_OI)

    def improve(
        self,
        weight_IO: Tensor,
        mask_IO: Tensor,
        gram_II: Tensor,
        target_IO: Tensor,
        pattern: NMPattern,
    ) -> Tensor:
        """The mask after all swaps.

        Args:
            weight_IO: fp32, transposed, so that each step works on contiguous memory.
            mask_IO: exactly N:M along the first dimension; it is not changed.
            gram_II: G, fp32.
            target_IO: b of every row.
            pattern: of the mask.
        """
        mask_IO = mask_IO.clone()
        rows_O = torch.arange(weight_IO.shape[1], device=weight_IO.device)
        for _ in range(self.sweeps):
            before_IO = mask_IO[:, rows_O]
            part = weight_IO[:, rows_O], before_IO, gram_II, target_IO[:, rows_O]
            mask_IO[:, rows_O] = after_IO = sweep(*part, pattern)
            # A row of which no group was changed is at its end.
            rows_O = rows_O[(after_IO != before_IO).any(0)]
            if not len(rows_O):
                break
        return mask_IO


@by_shape
def sweep(
    weight_IO: Tensor, mask_IO: Tensor, gram_II: Tensor, target_IO: Tensor, pattern: NMPattern
) -> Tensor:
    """Visit each group once, and make the best swap of each row there, if one helps; arguments as
    for :meth:`Swaps.improve`.
    """
    mask_IO = mask_IO.clone()
    residual_IO = gram_II @ torch.where(mask_IO, weight_IO, 0) - target_IO
    width = pattern.m * max(1, COLUMNS // pattern.m)  # no group straddles two runs of columns
    for start in range(0, len(weight_IO), width):
        run = slice(start, min(start + width, len(weight_IO)))
        mask_IO[run], change_CO = _swap_columns(
            weight_IO[run], mask_IO[run], gram_II[run, run], residual_IO[run], pattern.m
        )
        residual_IO[run.stop :].addmm_(gram_II[run.stop :, run], change_CO)
    return mask_IO


@by_shape
def _swap_columns(
    weight_CO: Tensor, mask_CO: Tensor, gram_CC: Tensor, residual_CO: Tensor, m: int
) -> tuple[Tensor, Tensor]:
    """Visit each group of a run of columns.

    Returns:
        The run's new mask, and the change of v.
    """
    mask_CO, residual_CO = mask_CO.clone(), residual_CO.clone()
    change_CO = torch.zeros_like(weight_CO)
    for start in range(0, len(weight_CO), m):
        group, later = slice(start, start + m), slice(start + m, None)
        weight_MO, mask_MO, gram_MM = weight_CO[group], mask_CO[group], gram_CC[group, group]
        change_MMO = error_change(weight_MO, mask_MO, gram_MM, residual_CO[group])
        least_O, pair_O = change_MMO.flatten(0, 1).min(0)
        own_MO = weight_MO.square() * gram_MM.diagonal()[:, None]
        helps_O = least_O < -LEAST_GAIN * own_MO.amax(0)
        moved_MO = torch.zeros_like(mask_MO)
        moved_MO.scatter_(0, torch.stack([pair_O // m, pair_O % m]), helps_O.expand(2, -1))
        change_CO[group] = torch.where(mask_MO, -weight_MO, weight_MO).masked_fill(~moved_MO, 0)
        mask_MO.logical_xor_(moved_MO)
        residual_CO[later].addmm_(gram_CC[later, group], change_CO[group])
    return mask_CO, change_CO


def error_change(
    weight_MO: Tensor, mask_MO: Tensor, gram_MM: Tensor, residual_MO: Tensor
) -> Tensor:
    """dE of every swap in one group of each row; infinite for what is no swap.

    Args:
        weight_MO, mask_MO: of the group.
        gram_MM: G's rows and columns of the group.
        residual_MO: r.

    Returns:
        ``[M, M, O]``, by the weight that is dropped and the one that comes back.
    """
    own_MO = weight_MO.square() * gram_MM.diagonal()[:, None]
    cross_MO = 2 * weight_MO * residual_MO
    drop_MO = (own_MO - cross_MO).masked_fill(~mask_MO, torch.inf)
    add_MO = (own_MO + cross_MO).masked_fill(mask_MO, torch.inf)
    both_MMO = weight_MO[:, None] * weight_MO * gram_MM[:, :, None]
    return drop_MO[:, None] + add_MO - 2 * both_MMO


@by_shape
def refit(
    weight_IO: Tensor, mask_IO: Tensor, gram_II: Tensor, target_IO: Tensor, damping: float
) -> Tensor:
    """The kept weights with the least E, plus damping: by conjugate gradients on all rows at once,
    scaled by G's diagonal; the other arguments as for :meth:`Swaps.improve`.
    """
    share = damping * gram_II.diagonal().mean()
    scale_I1 = gram_II.diagonal()[:, None] + share
    scale_I1 = torch.where(scale_I1 > 0, scale_I1, 1)  # an input that is always zero

    def product(x_IO: Tensor) -> Tensor:
        return torch.where(mask_IO, gram_II @ x_IO + share * x_IO, 0)

    x_IO = torch.where(mask_IO, weight_IO, 0)
    residual_IO = torch.where(mask_IO, target_IO + share * weight_IO, 0) - product(x_IO)
    step_IO = residual_IO / scale_I1
    size_O = (residual_IO * step_IO).sum(0)
    for _ in range(REFIT_STEPS):
        product_IO = product(step_IO)
        rate_O = _ratio(size_O, (step_IO * product_IO).sum(0))
        x_IO = x_IO + rate_O * step_IO
        residual_IO = residual_IO - rate_O * product_IO
        scaled_IO = residual_IO / scale_I1
        before_O, size_O = size_O, (residual_IO * scaled_IO).sum(0)
        step_IO = scaled_IO + _ratio(size_O, before_O) * step_IO
    return x_IO


def _ratio(above_O: Tensor, below_O: Tensor) -> Tensor:
    """Zero where a row has converged."""
    return torch.where(below_O > 0, above_O / below_O, 0)
