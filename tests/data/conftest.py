"""A tokenizer of a few words, and files to read."""

import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
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


def write_rows(path: Path, rows: Sequence[object]) -> str:
    """Writes JSON lines of any kind; returns the path as a string."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def write_parquet(path: Path, rows: list[dict[str, Any]], rows_a_group: int = 2) -> str:
    """Writes a Parquet file of several row groups; returns the path as a string."""
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=rows_a_group)
    return str(path)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A data set in the hub's layout, as a source's path.

    Config ``en`` has the splits train, of three files with 4, 5 and 6 documents of 3 to 6 words,
    and test, of one document; config ``de`` has only train.
    """
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "corpus"
    for part, texts in enumerate(HUB_PARTS):
        rows = [{"text": text, "url": part} for text in texts]
        write_rows(folder / "en" / f"train-{part}.jsonl", rows)
    write_rows(folder / "en" / "test.jsonl", [{"text": words(7, 30), "url": 0}])
    write_rows(folder / "de" / "train.jsonl", [{"text": words(9, 30), "url": 0}])
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: en\n  data_files:\n"
        "  - {split: train, path: en/train-*.jsonl}\n  - {split: test, path: en/test.jsonl}\n"
        "- config_name: de\n  data_files:\n  - {split: train, path: de/train.jsonl}\n---\n"
    )
    return f"hf://{folder}"


HUB_PARTS = [
    [words(10 * part + 30 * number, 3 + (part + number) % 4) for number in range(4 + part)]
    for part in range(3)
]
