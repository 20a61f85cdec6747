"""Masks and exports that the tests of this folder share."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from sparsify import NMPattern
from sparsify.export.folder import export
from sparsify.masking.inject import hard_masks
from tests.conftest import word_tokenizer
from tests.export.test_folder import masked_module
from tests.tiny_models import FAMILIES

EXPORTS = [
    pytest.param(family, pattern, id=f"{family} {pattern}")
    for family, pattern in [
        ("llama", "2:4"),
        ("llama", "1:4"),
        ("llama", "4:8"),
        ("tied llama", "2:4"),
        ("qwen2", "4:8"),
        ("gpt2", "2:4"),
        ("gpt2", "4:8"),
    ]
]


def exported(family: str, pattern: str, folder: Path) -> dict[str, Tensor]:
    """Write ``folder/base`` and ``folder/out``, and give the masks of the latter."""
    model: PreTrainedModel = FAMILIES[family]()
    model.save_pretrained(folder / "base")
    word_tokenizer().save_pretrained(folder / "base")
    module = masked_module(model, word_tokenizer(), pattern=pattern)
    export(module.masked, folder / "out", {})
    return dict(hard_masks(model))


def random_mask(rows: int, columns: int, pattern: str = "2:4", seed: int = 0) -> Tensor:
    """A mask with random candidates."""
    generator = torch.Generator().manual_seed(seed)
    return NMPattern.parse(pattern).top(torch.rand(rows, columns, generator=generator))


def equal(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> bool:
    """Whether both hold the same masks."""
    return found.keys() == wanted.keys() and all(
        found[name].dtype == torch.bool and torch.equal(found[name], mask)
        for name, mask in wanted.items()
    )
