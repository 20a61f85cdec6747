"""Runs exported models, sparse where that is faster."""

from sparsify.serving.choose import Choice, Choices
from sparsify.serving.loading import choices, load

__all__ = ["Choice", "Choices", "choices", "load"]
