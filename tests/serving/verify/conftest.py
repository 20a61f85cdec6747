"""An export, whole and to be damaged."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from sparsify import SparseCausalLM
from sparsify.export.folder import export
from sparsify.masking.strategy import SparsityStrategy
from sparsify.strategies.magnitude import Magnitude
from sparsify.training.build import calibrate
from tests.conftest import tiny_llama


def write(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    folder: Path,
    strategy: SparsityStrategy | None = None,
    **options: Any,
) -> SparseCausalLM:
    """Save the model as ``base`` and its masked export as ``out``."""
    model.save_pretrained(folder / "base")
    module = SparseCausalLM.from_model(model, tokenizer, strategy or Magnitude(), **options)
    module.configure_model()
    calibrate(module)
    export(module.masked, folder / "out", {})
    return module


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    folder = tmp_path_factory.mktemp("exported")
    write(tiny_llama(), tokenizer, folder)
    return folder


@pytest.fixture
def out(exported: Path, tmp_path: Path) -> Path:
    """A copy of the tiny Llama's export, to be damaged."""
    return Path(shutil.copytree(exported / "out", tmp_path / "copy"))
