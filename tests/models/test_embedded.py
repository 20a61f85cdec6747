"""The model and the text that come with the package."""

import gzip
import json
from pathlib import Path

import pytest
import torch

from sparsify.common.errors import SparsifyError
from sparsify.data import TextDataModule
from sparsify.models.base import EMBEDDED, EMBEDDED_FOLDER, load_model, load_tokenizer
from sparsify.models.perplexity import token_losses
from sparsify.training.guards import check_text

TEXT = EMBEDDED_FOLDER / "text"
DOMAINS = ("shakespeare", "bible", "python")


def documents(path: Path) -> list[str]:
    """The texts of one file."""
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line)["text"] for line in lines]


def test_it_is_small_and_names_its_licences() -> None:
    files = [path for path in EMBEDDED_FOLDER.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 15e6
    licences = (EMBEDDED_FOLDER / "LICENSES.md").read_text(encoding="utf-8")
    assert all(f"text/{domain}" in licences for domain in DOMAINS)


@pytest.mark.parametrize("domain", DOMAINS)
def test_no_document_is_in_two_splits(domain: str) -> None:
    train, validation, test = (
        set(documents(TEXT / domain / f"{split}.jsonl.gz"))
        for split in ("train", "validation", "test")
    )
    assert not train & validation
    assert not train & test
    assert not validation & test
    assert len(train) > 200
    assert min(sum(map(len, split)) for split in (validation, test)) >= 80_000


def test_it_predicts_text_that_it_has_not_seen() -> None:
    model, tokenizer = load_model(EMBEDDED), load_tokenizer(EMBEDDED)
    assert 2e6 < model.num_parameters() < 4e6
    text = documents(TEXT / "bible" / "test.jsonl.gz")[0]
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    data = TextDataModule(tokenizer=tokenizer)
    data.setup("test")
    assert data.test_names == list(DOMAINS)
    with torch.no_grad():
        for loader, limit in zip(data.test_dataloader(), (3.8, 3.2, 3.4), strict=True):
            batch = next(iter(loader))
            assert token_losses(model(input_ids=batch).logits, batch).mean() < limit


def test_as_an_object_it_may_have_its_own_text() -> None:
    name = load_model(EMBEDDED).config._name_or_path
    check_text(name, True, "learn")
    with pytest.raises(SparsifyError, match="the embedded text is made for the embedded model"):
        check_text(str(EMBEDDED_FOLDER), True, "learn")
