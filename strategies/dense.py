"""The reference: nothing is masked."""

from typing import ClassVar

from sparsify.masking.strategy import SparsityStrategy


class Dense(SparsityStrategy):
    """Leaves every layer as it is, so that the base model is measured under the same protocol as
    its sparse versions.
    """

    prunes: ClassVar[bool] = False
