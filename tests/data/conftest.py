"""A tokenizer of a few words, and files to read."""

import gzip
import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

SPECIAL = ("<eos>", "<unk>")
WORDS = list(SPECIAL) + [f"w{i}" for i in range(200)]


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    """Words w0 to w199 have ids 2 to 201; the end-of-text token has id 0."""
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token=SPECIAL[1]))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    # A context of 4 tokens: packing must not warn that documents are longer.
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token=SPECIAL[0], unk_token=SPECIAL[1], model_max_length=4
    )


def words(first: int, count: int) -> str:
    """The text ``w<first> w<first+1> ...`` of `count` words."""
    return " ".join(f"w{(first + i) % 200}" for i in range(count))


def write_jsonl(path: Path, texts: list[str], key: str = "text") -> str:
    """Writes rows, gzipped if the name ends in .gz; returns the path as a string."""
    content = "".join(json.dumps({key: text}) + "\n" for text in texts).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return str(path)
