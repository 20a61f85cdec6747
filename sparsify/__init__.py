"""Learn, evaluate and export N:M sparse masks for Hugging Face language models.

A public name is imported when it is first asked for: the command line's help must not wait for
PyTorch.
"""

from typing import TYPE_CHECKING

from sparsify.common.lazy import lazy

if TYPE_CHECKING:
    from sparsify.api import Sparsified, sparsify
    from sparsify.calibration import Calibration, Hessian, Moments
    from sparsify.common.errors import SparsifyError
    from sparsify.data import Source, TextDataModule
    from sparsify.masking.distillation import Distillation
    from sparsify.masking.effect import Effect
    from sparsify.masking.masker import Draw, FixedMasker, Masker
    from sparsify.masking.pattern import NMPattern
    from sparsify.masking.run import Run, RunResult
    from sparsify.masking.schedule import Schedule
    from sparsify.masking.strategy import Block, LayerResult, SparsityStrategy
    from sparsify.models.base import load_model, load_tokenizer
    from sparsify.serving.keep_zeros import KeepZeros
    from sparsify.training.module import SparseCausalLM
else:
    __getattr__, __dir__ = lazy(
        __name__,
        {
            "Block": "sparsify.masking.strategy",
            "Calibration": "sparsify.calibration",
            "Distillation": "sparsify.masking.distillation",
            "Draw": "sparsify.masking.masker",
            "Effect": "sparsify.masking.effect",
            "FixedMasker": "sparsify.masking.masker",
            "Hessian": "sparsify.calibration",
            "KeepZeros": "sparsify.serving.keep_zeros",
            "LayerResult": "sparsify.masking.strategy",
            "Masker": "sparsify.masking.masker",
            "Moments": "sparsify.calibration",
            "NMPattern": "sparsify.masking.pattern",
            "Run": "sparsify.masking.run",
            "RunResult": "sparsify.masking.run",
            "Schedule": "sparsify.masking.schedule",
            "Source": "sparsify.data",
            "SparseCausalLM": "sparsify.training.module",
            "Sparsified": "sparsify.api",
            "SparsifyError": "sparsify.common.errors",
            "SparsityStrategy": "sparsify.masking.strategy",
            "TextDataModule": "sparsify.data",
            "load_model": "sparsify.models.base",
            "load_tokenizer": "sparsify.models.base",
            "sparsify": "sparsify.api",
        },
    )

__all__ = [
    "Block",
    "Calibration",
    "Distillation",
    "Draw",
    "Effect",
    "FixedMasker",
    "Hessian",
    "KeepZeros",
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
    "load_model",
    "load_tokenizer",
    "sparsify",
]
