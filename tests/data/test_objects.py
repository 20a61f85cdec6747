"""Data in Python: paths, data sets, rows and texts."""

import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast

from sparsify.common.errors import SparsifyError
from sparsify.data import Source, TextDataModule, files
from tests.data.conftest import words, write_jsonl

TEXTS = [words(3 * i, 5) for i in range(6)]
ROWS = [{"text": text} for text in TEXTS]


def sha(data: TextDataModule) -> tuple[str, dict[str, Any]]:
    [source] = data.describe("train")["sources"].values()
    return source["sha256"], source


@pytest.mark.parametrize(
    "given",
    [
        lambda: datasets.Dataset.from_list(ROWS),
        lambda: datasets.Dataset.from_list(ROWS).to_iterable_dataset(),
        lambda: datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)}),
        lambda: {"mine": datasets.Dataset.from_list(ROWS)},
        lambda: {"mine": TEXTS},
        lambda: {"mine": Source(TEXTS)},
        lambda: ROWS,
        lambda: iter(ROWS),
        lambda: (row for row in ROWS),
        lambda: Source([{"content": text} for text in TEXTS], text_key="content"),
    ],
)
def test_an_object_is_read_as_a_file_of_its_rows(
    given: Callable[[], Any], tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    file = Path(write_jsonl(tmp_path / "rows.jsonl", TEXTS))
    expected, _ = sha(TextDataModule(train=file, block_size=4, tokenizer=tokenizer))
    assert sha(TextDataModule(train=[file], block_size=4, tokenizer=tokenizer))[0] == expected
    data = TextDataModule(train=given(), block_size=4, tokenizer=tokenizer)
    found, source = sha(data)
    assert found == expected
    assert source["file"].startswith("python ")
    assert not data.embedded
    data._packed_with = None  # as for another tokenizer: read again
    assert sha(data)[0] == expected


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (lambda: DataLoader(TEXTS), "train is a DataLoader"),
        (lambda: datasets.Dataset, "train is a type|train is a Dataset"),
        (lambda: 3, "train is a int"),
        (lambda: b"text", "train is a bytes"),
        (lambda: {"a": 3}, "train is a int"),
        (lambda: datasets.DatasetDict({"dev": datasets.Dataset.from_list(ROWS)}), "only dev"),
        (lambda: datasets.Dataset.from_list([]), "less than one block|no column"),
        (lambda: datasets.Dataset.from_list([{"content": "w1"}]), "its columns are content"),
        (lambda: [{"content": "w1"}], "its keys are 'content': name the right one by text_key"),
        (lambda: ["w1 w2 " * 300], "texts themselves, in Python"),
    ],
)
def test_what_is_no_text_is_refused_with_the_way(
    given: Callable[[], Any], message: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    with pytest.raises(SparsifyError, match=message):
        TextDataModule(train=given(), block_size=4, tokenizer=tokenizer).setup("fit")


def test_a_json_array_is_read_as_its_rows(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    lines = write_jsonl(tmp_path / "rows.jsonl", TEXTS)
    expected, _ = sha(TextDataModule(train=lines, block_size=4, tokenizer=tokenizer))
    for indent in (None, 1):
        array = tmp_path / "array.json"
        array.write_text(json.dumps(ROWS, indent=indent))
        found, _ = sha(TextDataModule(train=array, block_size=4, tokenizer=tokenizer))
        assert found == expected
    array.write_text('[1]\n{"text": "w1 w2 w3 w4"}\n')  # a bad row, and a good one
    data = TextDataModule(train=array, block_size=4, tokenizer=tokenizer)
    with pytest.raises(SparsifyError, match="array.json:1: row is not an object"):
        data.setup("fit")


def test_what_is_too_long_or_no_file_is_named(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "LONGEST", 40)
    bomb = gzip.compress(b"w1 " * 100)
    (tmp_path / "bomb.txt.gz").write_bytes(bomb)
    write_jsonl(tmp_path / "long.jsonl", ["w1", "w1 " * 100])
    os.mkfifo(tmp_path / "pipe.txt")
    for name, message in (
        ("bomb.txt.gz", "bomb.txt.gz:1 is longer than 40 characters"),
        ("long.jsonl", "long.jsonl:2 is longer than 40 characters"),
        ("pipe.txt", "pipe.txt is a device, a pipe or a socket"),
    ):
        data = TextDataModule(train=tmp_path / name, block_size=4, tokenizer=tokenizer)
        with pytest.raises(SparsifyError, match=message):
            data.setup("fit")
