import hashlib
import logging
import struct
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from sparsify.common.errors import SparsifyError
from sparsify.data import packing
from sparsify.data.documents import Document
from sparsify.data.packing import Packer, pack
from sparsify.data.pieces import pieces
from tests.data.conftest import words


def reference(documents: list[str]) -> list[int]:
    """Ids by hand: word w<i> is i + 2, the separator is 0."""
    stream: list[int] = []
    for number, document in enumerate(documents):
        stream += [0] * (number > 0) + [int(word[1:]) + 2 for word in document.split()]
    return stream


@pytest.mark.parametrize("block_size", [2, 7, 64])
@pytest.mark.parametrize("documents", [1, 5, 64, 65, 200])
def test_blocks_equal_the_concatenated_documents(
    tokenizer: PreTrainedTokenizerFast, documents: int, block_size: int
) -> None:
    texts = [words(3 * i, 5 + i % 9) for i in range(documents)]
    texts[0] = words(0, 70)
    packed = pack(iter(texts), tokenizer, block_size, "x")
    stream = reference(texts)
    blocks = len(stream) // block_size
    assert packed.blocks.tolist() == [
        stream[i * block_size : (i + 1) * block_size] for i in range(blocks)
    ]
    assert packed.blocks.dtype == torch.int32
    assert packed.documents == documents
    assert packed.tokens == len(stream)
    assert packed.dropped == len(stream) - blocks * block_size
    assert packed.sha256 == hashlib.sha256(struct.pack(f"<{len(stream)}i", *stream)).hexdigest()


def test_one_document_has_no_separator(tokenizer: PreTrainedTokenizerFast) -> None:
    assert 0 not in pack([words(0, 20)], tokenizer, 5, "x").blocks
    assert pack([words(0, 20)], tokenizer, 5, "x").dropped == 0


def test_logs_one_line(
    tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="sparsify"):
        pack([words(0, 20), words(1, 3)], tokenizer, 5, "wikitext")
    (record,) = caplog.records
    assert record.getMessage() == "wikitext: 2 documents, 24 tokens, 4 blocks, 4 tokens dropped"


@pytest.mark.parametrize("count", [0, 37])
def test_less_than_one_block(tokenizer: PreTrainedTokenizerFast, count: int) -> None:
    with pytest.raises(SparsifyError) as caught:
        pack([words(0, count)] * (count > 0), tokenizer, 256, "wikitext")
    assert str(caught.value) == (
        f"wikitext: {count} tokens are less than one block of 256; add text or lower "
        "--data.block_size"
    )


def test_tokenizer_without_end_of_text(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.eos_token = None
    with pytest.raises(
        SparsifyError, match="x: the tokenizer's eos_token is None; .*set tokenizer"
    ):
        pack([words(0, 20)], tokenizer, 5, "x")


@pytest.mark.parametrize("text", [words(0, 3000), words(0, 3000).replace(" ", "\n"), "w1" * 900])
def test_a_long_document_is_tokenised_in_pieces_to_the_same_tokens(
    text: str, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Packer._encode
    longest = 0

    def encode(self: Packer, documents: Sequence[Document]) -> Iterator[list[int]]:
        nonlocal longest
        longest = max(longest, sum(len(document) for document in documents))
        return real(self, documents)

    whole = pack([text, "w5 w6"], tokenizer, 2, "whole") if " " in text or "\n" in text else None
    monkeypatch.setattr(packing, "LONGEST", 500)
    monkeypatch.setattr("sparsify.data.pieces.LONGEST", 500)
    monkeypatch.setattr("sparsify.data.pieces.CONTEXT", 50)
    monkeypatch.setattr(Packer, "_encode", encode)
    pieces = pack([text, "w5 w6"], tokenizer, 2, "pieces")
    assert longest <= 500
    assert pieces.documents == 2
    if whole is not None:  # a word without end cannot be cut
        assert pieces.sha256 == whole.sha256


def test_a_panic_of_the_tokenizer_is_a_message(monkeypatch: pytest.MonkeyPatch) -> None:
    class PanicException(BaseException):
        """As pyo3's."""

    class Panics:
        eos_token_id = 0
        is_fast = True

        def __call__(self, *args: Any, **options: Any) -> None:
            raise PanicException("capacity overflow")

    with pytest.raises(SparsifyError, match="documents 1 to 2 .capacity overflow"):
        Packer(Panics(), "mine").add(["a", "b"])


def test_a_long_document_is_cut_where_its_tokens_stay(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("sparsify.data.pieces.LONGEST", 64)

    def glued(texts: list[str]) -> list[list[int]]:  # two words at "b b" are one token
        return [[len(part) for part in text.replace("b b", "b_b").split()] for text in texts]

    text = "aa aa " * 6 + "b b b b b b b b b b b b b b b b b b b b b b b b b b b b b b" + " aa" * 9
    parts = list(pieces(text, glued, "mine, document 1"))
    assert "".join(parts) == text
    assert len(parts) > 1
    assert [n for part in glued(parts) for n in part] == glued([text])[0]
    assert not caplog.records
    hopeless = "b " * 200
    assert (
        "".join(pieces(hopeless, lambda ts: [[0, *t.encode()] for t in ts], "mine, document 2"))
        == hopeless
    )
    [warning] = caplog.messages
    assert "mine, document 2: the document is cut at character" in warning
