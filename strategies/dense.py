"""The dense reference: no layer is masked."""

from sparsify.masking.effect import Effect
from sparsify.masking.strategy import SparsityStrategy


class Dense(SparsityStrategy):
    """Leaves every layer as it is, so that the base model is measured under the same protocol as
    its sparse versions.
    """

    effect = Effect(prunes=False)
