"""Learn, evaluate and export N:M sparse masks for Hugging Face language models."""

from sparsify.api import Sparsified, sparsify
from sparsify.calibration import Calibration, Hessian, Moments
from sparsify.data import Source, TextDataModule
from sparsify.errors import SparsifyError
from sparsify.masker import Draw, FixedMasker, Masker
from sparsify.module import SparseCausalLM
from sparsify.pattern import NMPattern
from sparsify.schedule import Schedule
from sparsify.strategy import Block, LayerResult, Run, RunResult, SparsityStrategy

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
