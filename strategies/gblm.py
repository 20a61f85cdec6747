"""GBLM-Pruner: adds gradients to Wanda's score (Das et al., 2023, arXiv 2311.04902).

Shapes: O out, I in.
"""

from collections.abc import Iterable, Iterator

from sparsify.calibration import Moments
from sparsify.masking.strategy import Block, LayerResult, SparsityStrategy


class GBLM(SparsityStrategy):
    """Keeps the weights with the largest ``|W_ij| * (x_j + alpha * G_ij)``.

    G_ij is the l2 norm, over calibration windows, of the gradient of a window's mean loss in the
    dense model. x_j is the norm of input j divided by the square root of the number of windows, as
    in the authors' code; this division decides how x_j and G_ij are balanced.

    Args:
        alpha: the weight of the gradient.
    """

    independent_blocks = True

    def __init__(self, alpha: float = 100.0) -> None:
        super().__init__()
        self.alpha = alpha

    def calibrate(self, blocks: Iterable[Block]) -> Iterator[tuple[str, LayerResult]]:
        for block in blocks:
            gradients = block.gradient_norms()
            moments = block.collect(Moments)
            for name, layer in block.layers.items():
                moment = moments[name]
                input_I = moment.norm_I / moment.windows**0.5
                score_OI = layer.weight_OI.float().abs() * (input_I + self.alpha * gradients[name])
                yield name, LayerResult(layer.masker.pattern.top(score_OI))
