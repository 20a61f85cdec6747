"""RIA: relative importance times activation (Zhang et al., ICLR 2024, "Plug-and-Play: an efficient
post-training pruning method for large language models").

Shapes: O out, I in.
"""

from collections.abc import Iterable, Iterator

import torch

from sparsify.calibration import Moments
from sparsify.masking.strategy import Block, LayerResult, SparsityStrategy


class RIA(SparsityStrategy):
    """Keeps weights that are large within their row and column, and whose input is large.

    The score is ``(|W_ij| / sum_k |W_kj| + |W_ij| / sum_k |W_ik|) * ||X_j||^power``. The paper's
    channel permutations are left out: the layer before would have to absorb each, or it costs time.

    Args:
        power: the exponent of the input's norm.
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
                # In a row or column of zeros relative importance is 0, not 0 / 0.
                tiny = torch.finfo(torch.float32).tiny
                in_column_OI = size_OI / size_OI.sum(0).clamp(min=tiny)
                in_row_OI = size_OI / size_OI.sum(1, keepdim=True).clamp(min=tiny)
                score_OI = (in_column_OI + in_row_OI) * moments[name].norm_I ** self.power
                yield name, LayerResult(layer.masker.pattern.top(score_OI))
