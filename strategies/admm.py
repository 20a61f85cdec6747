"""ADMM-Iter: masks and weights by the alternating direction method of multipliers (Boza, 2024,
arXiv 2401.02938).

Shapes: O out, I in.
"""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from sparsify.calibration import Hessian
from sparsify.common.errors import SparsifyError
from sparsify.masking.effect import Effect
from sparsify.masking.pattern import NMPattern
from sparsify.masking.strategy import Block, LayerResult, SparsityStrategy


class ADMM(SparsityStrategy):
    """Prunes a layer's weights step by step so that its output changes as little as possible.

    Weights are scaled by the norm of their input, so that the first choice is Wanda's. Once the
    mask is fixed, the iteration converges to the least-squares weights under that mask.

    Args:
        steps: the number of iterations.
        pruning_steps: during this many first iterations, the share of dropped weights rises along
            a cubic curve to that of the pattern.
        rho: penalty on the distance between the dense and the sparse variable.
        damping: added to the scaled Hessian's diagonal, whose entries are one.
    """

    effect = Effect(weights="updated")
    independent_blocks = True

    def __init__(
        self, steps: int = 20, pruning_steps: int = 15, rho: float = 1.0, damping: float = 0.1
    ) -> None:
        super().__init__()
        if not 1 <= pruning_steps <= steps:
            raise SparsifyError(
                f"pruning_steps={pruning_steps} of steps={steps}; it must be from 1 to steps"
            )
        if rho <= 0 or damping < 0:
            raise SparsifyError(
                f"rho={rho}, damping={damping}; rho must be positive, damping not negative"
            )
        self.steps, self.pruning_steps = steps, pruning_steps
        self.rho, self.damping = rho, damping

    def calibrate(self, blocks: Iterable[Block]) -> Iterator[tuple[str, LayerResult]]:
        for block in blocks:
            hessians = block.collect(Hessian)
            for name, layer in block.layers.items():
                mask_OI, weight_OI = self.solve(
                    layer.weight_OI.float(), hessians[name].matrix_II, layer.masker.pattern
                )
                if not weight_OI.isfinite().all():
                    raise SparsifyError(
                        f"{name}: its iteration does not converge; raise rho (now {self.rho}), "
                        f"damping (now {self.damping}) or --model.calibration.samples"
                    )
                yield name, LayerResult(mask_OI, weight_OI.to(layer.weight_OI.dtype))

    def solve(
        self, weight_OI: Tensor, hessian_II: Tensor, pattern: NMPattern
    ) -> tuple[Tensor, Tensor]:
        """Find one layer's mask and its weights, zero where dropped.

        Args:
            weight_OI: dense, fp32.
            hessian_II: X^T X, fp32.
            pattern: N of M to keep.
        """
        norm_I = hessian_II.diagonal().sqrt() + 1e-8
        scaled_II = hessian_II / norm_I / norm_I[:, None]
        eye_II = torch.eye(len(norm_I), dtype=norm_I.dtype, device=norm_I.device)
        scaled_II += self.damping * scaled_II.diagonal().mean() * eye_II
        inverse_II = torch.linalg.inv(scaled_II + self.rho * eye_II)
        dense_OI = weight_OI * norm_I
        target_OI = dense_OI @ scaled_II
        dual_OI = torch.zeros_like(dense_OI)
        mask_OI = torch.ones_like(dense_OI, dtype=torch.bool)
        for step in range(1, self.steps + 1):
            sum_OI = dense_OI + dual_OI
            if step <= self.pruning_steps:
                share = 1 - (1 - step / self.pruning_steps) ** 3
                mask_OI = _prune(sum_OI.abs(), share, pattern)
            sparse_OI = torch.where(mask_OI, sum_OI, 0)
            dual_OI = sum_OI - sparse_OI
            dense_OI = (target_OI + self.rho * (sparse_OI - dual_OI)) @ inverse_II
        return mask_OI, torch.where(mask_OI, dense_OI + dual_OI, 0) / norm_I


def _prune(score_OI: Tensor, share: float, pattern: NMPattern) -> Tensor:
    """Drop a share of the weights that the pattern will drop: those with the smallest scores of the
    layer.
    """
    kept_OI = pattern.top(score_OI)
    rest = score_OI[~kept_OI]
    count = int(share * len(rest))
    if count == len(rest):
        return kept_OI
    if count == 0:
        return torch.ones_like(kept_OI)
    return kept_OI | (score_OI > rest.kthvalue(count).values)
