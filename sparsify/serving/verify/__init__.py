"""Check that a folder of sparse weights is what it says."""

from sparsify.serving.verify.folder import verify
from sparsify.serving.verify.report import Report

__all__ = ["Report", "verify"]
