"""Packs documents into blocks of token ids of equal length.

A token that is context only, such as one of a prompt or a special token in front of a block, is
stored as the complement ``~id``, which is negative. So blocks need no second tensor that marks the
targets.

Shapes: T tokens of a block.
"""

import hashlib
import logging
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from sparsify.common.errors import SparsifyError
from sparsify.data.documents import Document, Instruction
from sparsify.data.pieces import LONGEST, pieces
from sparsify.data.windows import with_start
from sparsify.models.token_batch import TokenBatch

log = logging.getLogger("sparsify")

DOCUMENTS_A_CALL = 64  # enough for a fast tokenizer's threads, few enough for memory


@dataclass(frozen=True)
class PackedText:
    """Token blocks of one source.

    Args:
        blocks: int32 token ids [blocks, T], with half the memory of int64. A token that is context
            only is stored as the complement of its id.
        documents: Number of documents.
        tokens: Number of tokens of all documents and separators, dropped ones included; special
            tokens in front of blocks do not count.
        dropped: Number of tokens in the last partial block, which `blocks` leaves out.
        sha256: Hex digest of all `tokens` ids as little-endian int32. Equal digests mean equal
            text and tokenizer, whatever the block size.
    """

    blocks: Tensor
    documents: int
    tokens: int
    dropped: int
    sha256: str

    def describe(self) -> dict[str, Any]:
        """These numbers, for records."""
        return {
            "documents": self.documents,
            "tokens": self.tokens,
            "blocks": len(self.blocks),
            "dropped": self.dropped,
            "sha256": self.sha256,
        }


class Packer:
    """Joins documents with the end-of-text token.

    That token is a target if the token before it is one, so that the model learns to end a
    response; after context it is context only.

    Args:
        tokenizer: Must have an ``eos_token``, which separates documents. No other special token is
            added here.
        name: Name of the source, for messages.

    Attributes:
        ids: int32 ids not yet taken; the complement of an id if the token is context only.
        documents: Number of documents so far.

    Raises:
        SparsifyError: The tokenizer has no end-of-text token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
        separator = tokenizer.eos_token_id
        if not isinstance(separator, int):
            raise SparsifyError(
                f"{name}: the tokenizer's eos_token is {tokenizer.eos_token!r}; it separates "
                "documents and must exist: use a tokenizer with one, or set tokenizer.eos_token"
            )
        self.ids = array("i")
        self.documents = 0
        self._separator = separator
        self._last = 0  # the last id added
        self._tokenizer, self._name = tokenizer, name

    def add(self, documents: Sequence[Document]) -> None:
        """Appends documents.

        Args:
            documents: Few enough to tokenise at once.

        Raises:
            SparsifyError: The tokenizer does not tell which token belongs to which text.
        """
        for group in _calls(documents):
            if len(group) == 1 and isinstance(group[0], str):
                where = f"{self._name}, document {self.documents + 1}"
                parts = pieces(group[0], lambda texts: list(self._encode(texts)), where)
                self._append(ids for part in parts for ids in self._packed([part]))
            else:
                for ids in self._packed(group):
                    self._append([ids])

    def _packed(self, documents: Sequence[Document]) -> list["array[int]"]:
        """The ids of documents, as arrays, so that the tokenizer's lists are freed before `ids`
        grows.
        """
        return [array("i", ids) for ids in self._encode(documents)]

    def _append(self, pieces: Iterable["array[int]"]) -> None:
        """Appends one document, given in pieces."""
        if self.documents:
            self.ids.append(self._separator if self._last >= 0 else ~self._separator)
        for ids in pieces:
            self.ids.extend(ids)
        if self.ids:
            self._last = self.ids[-1]
        self.documents += 1

    def take(self, count: int) -> Tensor:
        """Removes the first ids: int32 [count]."""
        first = torch.from_numpy(np.array(self.ids[:count], dtype=np.int32))
        del self.ids[:count]
        return first

    def state_dict(self) -> dict[str, Any]:
        """The ids that were added but not yet taken, and the number of documents."""
        ids = torch.from_numpy(np.array(self.ids, dtype=np.int32))
        return {"ids": ids, "documents": self.documents, "last": self._last}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes back to what `state_dict` gave."""
        self.ids = array("i", state["ids"].tolist())
        self.documents, self._last = state["documents"], state["last"]

    def _encode(self, documents: Sequence[Document]) -> Iterator[list[int]]:
        texts = [d.text if isinstance(d, Instruction) else d for d in documents]
        marked = any(isinstance(d, Instruction) for d in documents)
        if marked and not getattr(self._tokenizer, "is_fast", False):
            raise SparsifyError(
                f"{self._name}: {type(self._tokenizer).__name__} does not tell which token stands "
                "for which text, so prompts are not told from responses: use a fast tokenizer"
            )
        backend: Any = self._tokenizer.backend_tokenizer if marked else None
        if marked:
            # It may trim spaces off the offsets: a token of spaces then has no place in the text.
            processor, backend.post_processor = backend.post_processor, None
        # verbose=False: no warning of a document longer than the context, as it is cut later
        try:
            encoded = self._tokenizer(
                texts,
                add_special_tokens=False,
                return_attention_mask=False,
                return_offsets_mapping=marked,
                verbose=False,
            )
        except BaseException as error:
            if type(error).__name__ != "PanicException":  # from Rust, and not an Exception
                raise
            raise SparsifyError(
                f"{self._name}: the tokenizer failed at documents {self.documents + 1} to "
                f"{self.documents + len(texts)} ({error}); it must take every text: look at these "
                "documents, or install another version of the package tokenizers"
            ) from error
        finally:
            if marked:
                backend.post_processor = processor
        if not marked:
            yield from encoded["input_ids"]
            return
        for document, ids, offsets in zip(
            documents, encoded["input_ids"], encoded["offset_mapping"], strict=True
        ):
            yield _mark(ids, offsets, document) if isinstance(document, Instruction) else ids


def pack(
    documents: Iterable[Document],
    tokenizer: PreTrainedTokenizerBase,
    block_size: int,
    name: str,
    start: Sequence[int] = (),
) -> PackedText:
    """Joins documents with the end-of-text token and cuts them into blocks.

    Args:
        documents: The documents, iterated once.
        tokenizer: As for `Packer`.
        block_size: Tokens per block.
        name: Name of the source, for messages.
        start: Ids of the special tokens in front of each block.

    Returns:
        The blocks; only the last partial block is dropped.

    Raises:
        SparsifyError: The tokenizer has no end-of-text token, or the text is less than one block.
    """
    packer = Packer(tokenizer, name)
    for texts in _batches(documents, DOCUMENTS_A_CALL):
        packer.add(texts)
    ids = packer.ids
    own = block_size - len(start)  # tokens of text
    blocks, dropped = divmod(len(ids), own)
    if not blocks:
        raise SparsifyError(
            f"{name}: {len(ids)} tokens are less than one block of {block_size}; add text or lower "
            "--data.block_size"
        )
    stream = np.frombuffer(ids, dtype=np.int32)  # shares the array's memory
    packed = PackedText(
        blocks=with_start(start, torch.from_numpy(stream[: blocks * own]).view(blocks, own)),
        documents=packer.documents,
        tokens=len(ids),
        dropped=dropped,
        sha256=hashlib.sha256(stream.astype("<i4", copy=False).data).hexdigest(),
    )
    _log(name, packed)
    return packed


def unmarked(blocks: Tensor) -> Tensor:
    """The plain token ids of blocks, with complements undone; int64 of the same shape."""
    blocks = blocks.long()
    return torch.where(blocks < 0, ~blocks, blocks)


def to_batch(blocks: Tensor, masked: bool) -> Tensor | TokenBatch:
    """Makes the batch that training reads.

    Args:
        blocks: int32 ids; the complement of an id if the token is context only.
        masked: Whether targets must be told from context.

    Returns:
        int64 token ids; if `masked`, a `TokenBatch` of them and their targets.
    """
    tokens = unmarked(blocks)
    return TokenBatch(tokens, blocks >= 0) if masked else tokens


def _mark(ids: list[int], offsets: list[tuple[int, int]], document: Instruction) -> list[int]:
    start, end = np.array(offsets, dtype=np.int64).reshape(-1, 2).T
    learned = np.zeros(len(ids), dtype=bool)
    for first, last in document.learned:
        learned |= (end > first) & (start < last)  # a token across the border is learned
    tokens = np.array(ids, dtype=np.int64)
    marked: list[int] = np.where(learned, tokens, ~tokens).tolist()
    return marked


@rank_zero_only
def _log(name: str, packed: PackedText) -> None:
    log.info(
        "%s: %d documents, %d tokens, %d blocks, %d tokens dropped",
        name,
        packed.documents,
        packed.tokens,
        len(packed.blocks),
        packed.dropped,
    )


def _calls(documents: Sequence[Document]) -> Iterator[list[Document]]:
    """Groups documents to tokenise together, with at most `LONGEST` characters where possible."""
    group: list[Document] = []
    size = 0
    for document in documents:
        length = len(document.text if isinstance(document, Instruction) else document)
        if group and size + length > LONGEST:
            yield group
            group, size = [], 0
        group.append(document)
        size += length
    if group:
        yield group


def _batches(documents: Iterable[Document], size: int) -> Iterator[list[Document]]:
    documents = iter(documents)
    while texts := list(islice(documents, size)):
        yield texts
