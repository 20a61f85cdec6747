"""Wanda: magnitude times the norm of the input (Sun et al., ICLR 2024, arXiv 2306.11695).

Shapes: O out, I in.
"""

from collections.abc import Iterable, Iterator

from sparsify.calibration import Moments
from sparsify.masking.strategy import Block, LayerResult, SparsityStrategy


class Wanda(SparsityStrategy):
    """Keeps the weights with the largest ``|W_ij| * ||X_j||``; X_j is input j over all tokens."""

    independent_blocks = True

    def calibrate(self, blocks: Iterable[Block]) -> Iterator[tuple[str, LayerResult]]:
        for block in blocks:
            moments = block.collect(Moments)
            for name, layer in block.layers.items():
                score_OI = layer.weight_OI.float().abs() * moments[name].norm_I
                yield name, LayerResult(layer.masker.pattern.top(score_OI))
