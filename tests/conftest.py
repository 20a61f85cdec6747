"""What all tests share: a tiny model, a tiny tokenizer, some text; and no network."""

import os
import random
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "offline"

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from sparsify import SparsityStrategy
from sparsify.cli.main import main
from sparsify.masking.layer import base_parameters
from sparsify.masking.masked_model import MaskedModel
from sparsify.masking.select import Selection
from sparsify.models.base import BaseModel
from sparsify.models.hashes import hash_parameters
from sparsify.training.trainer import Trainer

torch.set_num_threads(1)  # the tensors are tiny: a second thread is slower, on busy cores ten times

ROOT = Path(__file__).parents[1]
Scripts = Callable[[str], ModuleType]
EOS = "<eos>"
SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "tie_word_embeddings": False,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": 0,
}
WORDS = [f"w{i}" for i in range(62)]


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> Scripts:
    """Imports a script of ``benchmarks/`` or ``docs/`` by its name."""
    for folder in ("benchmarks", "docs"):
        monkeypatch.syspath_prepend(str(ROOT / folder))
    return import_module


# Files with few tests that take long: begun last, they would keep one of two workers waiting.
LONG = {
    *("test_two_ranks", "test_population_run", "test_masked_gather", "test_crash", "test_golden"),
    *("test_kill", "test_graceful_stop", "test_policy_gradient", "test_content", "test_write"),
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that take longest."""
    items.sort(key=lambda item: item.path.stem not in LONG)


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Keep results of calibration in a folder of this session, not in the user's."""
    os.environ["SPARSIFY_CACHE"] = str(tmp_path_factory.mktemp("cache"))


def word_tokenizer() -> PreTrainedTokenizerFast:
    """64 entries: 62 words, an unknown one and the end of text."""
    vocab = {word: i for i, word in enumerate([EOS, "<unk>", *WORDS])}
    model = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))  # noqa: S106
    model.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=model, eos_token=EOS, unk_token="<unk>")  # noqa: S106


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return word_tokenizer()


def tiny_llama(seed: int = 0) -> LlamaForCausalLM:
    """Two blocks, 32 wide, weights large enough that masks change the loss."""
    config = LlamaConfig(**SIZES)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).eval()


@pytest.fixture
def model() -> LlamaForCausalLM:
    return tiny_llama()


@pytest.fixture(scope="session")
def model_folder(
    tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast
) -> Path:
    """The tiny model and tokenizer as a folder that ``--model.name_or_path`` takes."""
    folder = tmp_path_factory.mktemp("model")
    tiny_llama().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with train, validation and test text: words in a loose order, 4000, 400 and 400."""
    folder = tmp_path_factory.mktemp("text")
    rng = random.Random(0)  # noqa: S311
    for split, count in (("train", 4000), ("validation", 400), ("test", 400)):
        at, words = 0, []
        for _ in range(count):
            at = (at * 3 + rng.choice((1, 2, 5))) % len(WORDS)
            words.append(WORDS[at])
        (folder / f"{split}.txt").write_text(" ".join(words), encoding="utf-8")
    return folder


def masked_model(
    model: PreTrainedModel, strategy: SparsityStrategy, selection: Selection = Selection()
) -> MaskedModel:
    """The model with masked layers, whose maskers have no values yet."""
    digest = hash_parameters(base_parameters(model))
    return MaskedModel(BaseModel(model, "tiny", model.dtype, digest), strategy, selection)


class Cli:
    """Runs the command line in this process, in an own folder, on the tiny model and text."""

    def __init__(self, folder: Path, model: Path, text: Path) -> None:
        self.folder = folder
        self.model = [f"--model.name_or_path={model}"]
        self.data = [
            f"--data.{split}={text}/{split}.txt" for split in ("train", "validation", "test")
        ]
        self.data += ["--data.block_size=16", "--data.batch_size=4", "--data.eval_batch_size=8"]
        self.trainer = ["--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu"]

    def __call__(self, command: str, *words: str, steps: int = 2, data: bool = True) -> None:
        """Run a command; ``words`` come last and so win."""
        options = [
            *self.model,
            *self.trainer,
            f"--trainer.max_steps={steps}",
            *(self.data if data else []),
        ]
        main([command, *options, *words])

    def runs(self) -> list[Path]:
        """The folders of the runs so far, oldest first."""
        folders = self.folder.glob("runs/*/version_*")
        return sorted(folders, key=lambda path: path.stat().st_mtime_ns)


def start_in(folder: Path, patch: pytest.MonkeyPatch) -> None:
    """Have the command line find what it does where it is started in a folder."""
    patch.chdir(folder)
    patch.setattr("sys.argv", ["sparsify"])
    patch.setattr("sys.path", list(sys.path))


@pytest.fixture
def cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model_folder: Path, text: Path) -> Cli:
    """The command line, started in ``tmp_path``."""
    start_in(tmp_path, monkeypatch)
    return Cli(tmp_path, model_folder, text)


def quiet_trainer(folder: Path, **settings: Any) -> Trainer:
    """A Trainer on CPU that writes and shows nothing."""
    return Trainer(
        **{
            "accelerator": "cpu",
            "devices": 1,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "use_distributed_sampler": False,
            "num_sanity_val_steps": 0,
            "limit_val_batches": 0,
            "default_root_dir": folder,
            **settings,
        }
    )
