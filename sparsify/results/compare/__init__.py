"""Compares finished runs: which strategy is best at which cost, and how sure that is."""

from sparsify.results.compare.comparison import Comparison, compare

__all__ = ["Comparison", "compare"]
