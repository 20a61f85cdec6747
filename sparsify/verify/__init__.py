"""Check that a folder of sparse weights is what it says."""

from sparsify.verify.folder import verify
from sparsify.verify.report import Report

__all__ = ["Report", "verify"]
