"""Runs exported models, sparse where that is faster."""

from typing import TYPE_CHECKING

from sparsify.common.lazy import lazy

if TYPE_CHECKING:
    from sparsify.serving.choose import Choice, Choices
    from sparsify.serving.loading import choices, load
    from sparsify.serving.quantizer import SparsifyConfig
else:
    __getattr__, __dir__ = lazy(
        __name__,
        {
            "Choice": "sparsify.serving.choose",
            "Choices": "sparsify.serving.choose",
            "SparsifyConfig": "sparsify.serving.quantizer",
            "choices": "sparsify.serving.loading",
            "load": "sparsify.serving.loading",
        },
    )

__all__ = ["Choice", "Choices", "SparsifyConfig", "choices", "load"]
