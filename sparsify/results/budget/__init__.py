"""The best pattern for each part of a model within a budget, from measured losses."""

from sparsify.results.budget.goal import PATTERNS, Goal, Unit

__all__ = ["PATTERNS", "Goal", "Unit"]
