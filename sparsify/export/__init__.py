"""Everything that is written for others: the exported folder, its manifest, and mask files."""

from typing import TYPE_CHECKING

from sparsify.common.lazy import lazy

if TYPE_CHECKING:
    from sparsify.export.hub import push_to_hub
else:  # so that the parts that only show a mask file do not import PyTorch
    __getattr__, __dir__ = lazy(__name__, {"push_to_hub": "sparsify.export.hub"})

__all__ = ["push_to_hub"]
