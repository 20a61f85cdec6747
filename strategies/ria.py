"""RIA: relative importance times activation (Zhang et al., ICLR 2024, "Plug-and-Play: an efficient
post-training pruning method for large language models").

Shapes: O out, I in.
"""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from sparsify.calibration import Moments
from sparsify.masking.strategy import Block, LayerResult, SparsityStrategy


class RIA(SparsityStrategy):
    """Keeps weights that are large within their row and column, and whose input is large.

    The score is ``(|W_ij| / sum_k |W_kj| + |W_ij| / sum_k |W_ik|) * ||X_j||^power``. The
    paper's channel permutations, of which some cost time, are left out: ``--model.permute`` finds
    those that cost none, for any strategy.

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
                scale_I = moments[name].norm_I ** self.power
                score_OI = self.order_score(layer.weight_OI.float(), scale_I)
                yield name, LayerResult(layer.masker.pattern.top(score_OI))

    def input_scale(self, gram_II: Tensor) -> Tensor:
        return super().input_scale(gram_II) ** self.power

    def order_score(self, weight_OI: Tensor, scale_I: Tensor) -> Tensor:
        size_OI = weight_OI.abs()
        # In a row or column of zeros relative importance is 0, not 0 / 0.
        tiny = torch.finfo(torch.float32).tiny
        in_column_OI = size_OI / size_OI.sum(0).clamp(min=tiny)
        in_row_OI = size_OI / size_OI.sum(1, keepdim=True).clamp(min=tiny)
        return (in_column_OI + in_row_OI) * scale_I
