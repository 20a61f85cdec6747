"""Pruner-Zero: a score found by genetic programming (Dong et al., ICML 2024, arXiv 2406.02924).

Shapes: O out, I in.
"""

from collections.abc import Iterable, Iterator

from sparsify.masking.strategy import Block, LayerResult, SparsityStrategy


class PrunerZero(SparsityStrategy):
    """Keeps the weights with the largest ``W_ij^2 * (G_ij - min G)``, with G as in GBLM-Pruner.

    The published score is also divided by the layer's ``max G - min G``, which changes no choice
    within a group. The authors compute gradients on WikiText-2's training text and measure on its
    test text; here gradients come from the calibration text. To repeat their setting, give
    WikiText's training text as ``--data.train``; the WikiText perplexity is then a leak.
    """

    independent_blocks = True

    def calibrate(self, blocks: Iterable[Block]) -> Iterator[tuple[str, LayerResult]]:
        for block in blocks:
            gradients = block.gradient_norms()
            for name, layer in block.layers.items():
                gradient_OI = gradients[name]
                score_OI = layer.weight_OI.float().square() * (gradient_OI - gradient_OI.min())
                yield name, LayerResult(layer.masker.pattern.top(score_OI))
