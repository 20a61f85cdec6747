"""RIA: relative importance times activation (Zhang et al., ICLR 2024, "Plug-and-Play: an efficient
post-training pruning method for large language models").

Shapes: O out, I in.
"""

from collections.abc import Iterable, Iterator

import torch

from sparsify.calibration import Moments
from sparsify.masking.strategy import Block, LayerResult, SparsityStrategy


class RIA(SparsityStrategy):
    """Keeps weights that are large for their row and their column, and whose input is large.

    The score is ``(|W_ij| / sum_k |W_kj| + |W_ij| / sum_k |W_ik|) * ||X_j||^power``. Its channel
    permutations are not done: they would have to be absorbed by the layer before, or paid for.

    Args:
        power: how much the norm of an input counts.
    """

    independent_blocks = True

    def __init__(self, power: float = 0.5) -> None:
        super().__init__()
        self.power = power

    def calibrate(self, blocks: Iterable[Block]) -> Iterator[tuple[str, LayerResult]]:
        for block in blocks:
            moments = block.collect(Moments)
            for name, layer in block.layers.items():
                size_OI = layer.weight_OI.float().abs()
                # A row or column of zeros has no relative importance, not an undefined one.
                tiny = torch.finfo(torch.float32).tiny
                in_column_OI = size_OI / size_OI.sum(0).clamp(min=tiny)
                in_row_OI = size_OI / size_OI.sum(1, keepdim=True).clamp(min=tiny)
                score_OI = (in_column_OI + in_row_OI) * moments[name].norm_I ** self.power
                yield name, LayerResult(layer.masker.pattern.top(score_OI))
