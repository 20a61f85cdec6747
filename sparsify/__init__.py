"""Learn, evaluate and export N:M sparse masks for Hugging Face language models.

A public name is imported when it is first asked for: the command line's help must not wait for
PyTorch.
"""

from typing import TYPE_CHECKING

from sparsify.lazy import lazy

if TYPE_CHECKING:
    from sparsify.api import Sparsified, sparsify
    from sparsify.calibration import Calibration, Hessian, Moments
    from sparsify.data import Source, TextDataModule
    from sparsify.errors import SparsifyError
    from sparsify.masker import Draw, FixedMasker, Masker
    from sparsify.module import SparseCausalLM
    from sparsify.pattern import NMPattern
    from sparsify.schedule import Schedule
    from sparsify.strategy import Block, LayerResult, Run, RunResult, SparsityStrategy
else:
    __getattr__, __dir__ = lazy(
        __name__,
        {
            "Block": "sparsify.strategy",
            "Calibration": "sparsify.calibration",
            "Draw": "sparsify.masker",
            "FixedMasker": "sparsify.masker",
            "Hessian": "sparsify.calibration",
            "LayerResult": "sparsify.strategy",
            "Masker": "sparsify.masker",
            "Moments": "sparsify.calibration",
            "NMPattern": "sparsify.pattern",
            "Run": "sparsify.strategy",
            "RunResult": "sparsify.strategy",
            "Schedule": "sparsify.schedule",
            "Source": "sparsify.data",
            "SparseCausalLM": "sparsify.module",
            "Sparsified": "sparsify.api",
            "SparsifyError": "sparsify.errors",
            "SparsityStrategy": "sparsify.strategy",
            "TextDataModule": "sparsify.data",
            "sparsify": "sparsify.api",
        },
    )

__all__ = [
    "Block",
    "Calibration",
    "Draw",
    "FixedMasker",
    "Hessian",
    "LayerResult",
    "Masker",
    "Moments",
    "NMPattern",
    "Run",
    "RunResult",
    "Schedule",
    "Source",
    "SparseCausalLM",
    "Sparsified",
    "SparsifyError",
    "SparsityStrategy",
    "TextDataModule",
    "sparsify",
]
