"""Tasks of lm-evaluation-harness on an exported folder, beside its dense model."""

from sparsify.results.downstream.report import notes, table
from sparsify.results.downstream.run import Settings, evaluate, find_export

__all__ = ["Settings", "evaluate", "find_export", "notes", "table"]
