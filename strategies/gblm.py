"""GBLM-Pruner: Wanda's score and the gradient's (Das et al., 2023, arXiv 2311.04902).

Shapes: O out, I in.
"""

from collections.abc import Iterable, Iterator

from sparsify.calibration import Moments
from sparsify.masking.strategy import Block, LayerResult, SparsityStrategy


class GBLM(SparsityStrategy):
    """Keeps weights of large ``|W_ij| * (x_j + alpha * G_ij)``.

    G is the l2 norm over calibration windows of the gradient of a window's mean loss, of the dense
    model; x_j is the norm of input j divided by the root of the number of windows, as in the
    authors' code: the balance of the two depends on it.

    Args:
        alpha: weight of the gradient.
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
