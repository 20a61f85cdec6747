"""The best pattern for each part of a model within a budget, from measured losses."""

from sparsify.results.budget.goal import PATTERNS, Goal, Unit
from sparsify.results.budget.report import fit_words

__all__ = ["PATTERNS", "Goal", "Unit", "fit_words"]
