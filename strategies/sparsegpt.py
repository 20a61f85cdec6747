"""SparseGPT: drop the weights whose loss the other weights can best make up for (Frantar and
Alistarh, ICML 2023, arXiv 2301.00774).

Notation: a change dW of the weight changes the layer's output by a squared error tr(dW H dW^T),
where H = X^T X over all tokens, damped. H^-1 = U^T U with U upper triangular. Then ``U_jj^2`` is
the first diagonal entry of the inverse of ``H[j:, j:]``, and ``U[j, j:] / U_jj`` is the optimal
update of the weights from j on when w_j is removed (optimal brain surgeon, restricted to columns
that are not decided yet).

Shapes: O out, I in, M group size.
"""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from sparsify.calibration import Hessian
from sparsify.common.errors import SparsifyError
from sparsify.masking.by_shape import by_shape
from sparsify.masking.effect import Effect
from sparsify.masking.pattern import NMPattern
from sparsify.masking.strategy import Block, LayerResult, SparsityStrategy

COLUMNS = 128  # update all later columns once per so many columns, in one product
RETRIES = 4


class SparseGPT(SparsityStrategy):
    """Keeps the weights with the largest ``W_ij^2 / U_jj^2``, and can update the kept ones.

    Args:
        update_weights: change the weights to the right of a dropped one to make up for it. The
            default scores the dense weights once and changes none.
        damping: added to H's diagonal, as a share of its mean; if H cannot be factored, it is tried
            again with ten times as much.
    """

    independent_blocks = True

    def __init__(self, update_weights: bool = False, damping: float = 0.01) -> None:
        super().__init__()
        if damping < 0:
            raise SparsifyError(f"damping={damping}; it must not be negative: 0.01 is usual")
        self.update_weights = update_weights
        self.damping = damping
        self.effect = Effect(weights="updated" if update_weights else "frozen")

    def as_prior(self) -> SparsityStrategy:
        """With updates: masks that are chosen while weights move are better for the base weights
        too, at the same cost (SmolLM2-135M: perplexity 143.8 against 195.0).
        """
        return SparseGPT(update_weights=True, damping=self.damping)

    def calibrate(self, blocks: Iterable[Block]) -> Iterator[tuple[str, LayerResult]]:
        for block in blocks:
            hessian_II: Tensor | None = None
            hessians = block.collect(Hessian)
            for name, layer in block.layers.items():
                # Layers with the same input follow each other, and need one factor.
                if hessian_II is not (hessian_II := hessians[name].matrix_II):
                    factor_II = inverse_factor(hessian_II, self.damping, name)
                    dead_I = hessian_II.diagonal() == 0
                weight_OI = layer.weight_OI.float().masked_fill(dead_I, 0)
                pattern = layer.masker.pattern
                if self.update_weights:
                    mask_OI, new_OI = prune_and_update(weight_OI, factor_II, pattern)
                    yield name, LayerResult(mask_OI, new_OI.to(layer.weight_OI.dtype))
                else:
                    score_OI = (weight_OI / factor_II.diagonal()).square()
                    yield name, LayerResult(pattern.top(score_OI))

    def input_scale(self, gram_II: Tensor) -> Tensor:
        """``1 / sqrt([H^-1]_jj)``, as if every column were the first: ``U_jj`` depends on the order
        of columns.
        """
        factor_II = inverse_factor(gram_II, self.damping, "a layer whose channels are permuted")
        return factor_II.square().sum(0).rsqrt()


def inverse_factor(hessian_II: Tensor, damping: float, name: str) -> Tensor:
    """U, upper triangular, with U^T U the inverse of the damped Hessian.

    An input that is always zero gets a one on the diagonal.

    Args:
        hessian_II: symmetric, fp32; it is not changed.
        damping: the share of the mean diagonal that the first attempt adds.
        name: the layer's name, for messages.

    Raises:
        SparsifyError: the Hessian holds values that are not finite, or cannot be factored.
    """
    diagonal_I = hessian_II.diagonal()
    if not diagonal_I.isfinite().all():
        raise SparsifyError(
            f"{name}: its calibration activations overflow or are not numbers; load the model with "
            "--model.dtype float32 or bfloat16"
        )
    alive_I = torch.where(diagonal_I == 0, 1.0, diagonal_I)
    share = damping
    for _ in range(RETRIES + 1):
        damped_II = hessian_II.clone()
        damped_II.diagonal().copy_(alive_I + share * alive_I.mean())
        lower_II, failed = torch.linalg.cholesky_ex(damped_II)
        if not failed:
            upper_II, failed = torch.linalg.cholesky_ex(
                torch.cholesky_inverse(lower_II), upper=True
            )
            if not failed:
                return upper_II
        share = max(10 * share, 1e-4)
    raise SparsifyError(
        f"{name}: its Hessian cannot be factored, not even with {share / 10:g} of its mean added "
        f"to the diagonal; raise --model.calibration.samples, or damping (now {damping:g})"
    )


@by_shape
def prune_and_update(
    weight_OI: Tensor, factor_II: Tensor, pattern: NMPattern
) -> tuple[Tensor, Tensor]:
    """Prune column by column, and update later columns. A group's mask is chosen when its first
    column is reached, from the weights as updated so far.

    Args:
        weight_OI: fp32; it is not changed.
        factor_II: from :func:`inverse_factor`.
        pattern: N of M to keep.

    Returns:
        The mask and the updated weight, zero where it is dropped.
    """
    # Transposed, so that each step works on contiguous memory.
    weight_IO = weight_OI.T.clone(memory_format=torch.contiguous_format)
    mask_IO = torch.empty_like(weight_IO, dtype=torch.bool)
    inputs, m = len(weight_IO), pattern.m
    width = m * max(1, COLUMNS // m)  # no group straddles two runs of columns
    for start in range(0, inputs, width):
        run = slice(start, min(start + width, inputs))
        mask_IO[run], error_CO = _prune_columns(weight_IO[run], factor_II[run, run], pattern)
        weight_IO[run.stop :].addmm_(factor_II[run, run.stop :].T, error_CO, alpha=-1)
    return mask_IO.T, torch.where(mask_IO, weight_IO, 0).T


@by_shape
def _prune_columns(
    columns_CO: Tensor, factor_CC: Tensor, pattern: NMPattern
) -> tuple[Tensor, Tensor]:
    """Prune a run of columns, and update those of the run in place.

    Returns:
        Their mask, and the errors to take out of the columns after the run.
    """
    mask_CO = torch.empty_like(columns_CO, dtype=torch.bool)
    error_CO = torch.empty_like(columns_CO)
    scale_C = factor_CC.diagonal()
    for c in range(len(columns_CO)):
        if c % pattern.m == 0:
            group = slice(c, c + pattern.m)
            score_MO = (columns_CO[group] / scale_C[group, None]).square()
            mask_CO[group] = pattern.top(score_MO.T).T
        error_CO[c] = columns_CO[c].masked_fill(mask_CO[c], 0) / factor_CC[c, c]
        columns_CO[c + 1 :].addr_(factor_CC[c, c + 1 :], error_CO[c], alpha=-1)
    return mask_CO, error_CO
