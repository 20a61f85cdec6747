"""Magnitude pruning: keep the weights that are largest in absolute value (Han et al., 2015, arXiv
1506.02626).
"""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from sparsify.masking.strategy import Block, LayerResult, SparsityStrategy


class Magnitude(SparsityStrategy):
    """Keeps the N weights of largest magnitude in every group of M; needs neither data nor
    training.
    """

    def input_scale(self, gram_II: Tensor) -> Tensor:
        return torch.ones_like(gram_II.diagonal())

    def calibrate(self, blocks: Iterable[Block]) -> Iterator[tuple[str, LayerResult]]:
        for block in blocks:
            for name, layer in block.layers.items():
                yield name, LayerResult(mask=layer.masker.pattern.top(layer.weight_OI.abs()))
