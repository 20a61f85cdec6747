"""Relative importance: RIA's score (Zhang et al., ICLR 2024) without activations."""

from sparsify import LayerResult, SparsityStrategy


class MyStrategy(SparsityStrategy):
    """Keeps weights that are large for their row and their column."""

    def calibrate(self, blocks):
        for block in blocks:
            for name, layer in block.layers.items():
                size = layer.weight_OI.float().abs()
                score = size / size.sum(0) + size / size.sum(1, keepdim=True)
                yield name, LayerResult(layer.masker.pattern.top(score))
