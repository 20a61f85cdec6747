"""Run what was exported."""

from sparsify.runtime.choose import Choice, Choices
from sparsify.runtime.loading import choices, load

__all__ = ["Choice", "Choices", "choices", "load"]
